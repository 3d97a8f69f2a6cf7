"""What a language model learns from a teacher: its distribution over the next token.

Hinton et al. 2015 (arXiv:1503.02531): the divergence of both distributions, softened by a
temperature T and scaled by T², beside the labels' cross-entropy. It knows nothing of workers.

Shapes: B rows, T tokens, V vocabulary.

    teacher = Teacher(DistillationConfig(teacher="/…/model", temperature=2.0))
    loss = teacher.loss(model, input_ids_BT, labels_BT, weights_BT)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cluster.model_package.language_model import load_reference
from jobs.models.config import DistillationConfig
from jobs.models.decoder import prepare_decoder


class Teacher:
    """A frozen model on this machine, loaded when it is first asked."""

    def __init__(self, config: DistillationConfig) -> None:
        self._config = config
        self._model: Any = None

    def loss(
        self,
        model: torch.nn.Module,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        weights_BT: torch.Tensor | None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over tokens of weight times what the token costs, in float32; differentiable."""
        temperature, share = self._config.temperature, self._config.weight
        logits_BTV = model(input_ids=input_ids_BT, **inputs).logits.float()
        theirs_BTV = self._logits(input_ids_BT, **inputs)
        # Padded vocabularies may differ in size; what both know comes first.
        size = min(logits_BTV.shape[-1], theirs_BTV.shape[-1])
        divergence_BT = functional.kl_div(
            functional.log_softmax(logits_BTV[..., :size] / temperature, dim=-1),
            functional.log_softmax(theirs_BTV[..., :size] / temperature, dim=-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        losses_BT = functional.cross_entropy(logits_BTV.mT, labels_BT, reduction="none")
        costs_BT = (1 - share) * losses_BT + share * temperature**2 * divergence_BT
        return (costs_BT if weights_BT is None else costs_BT * weights_BT).sum()

    @torch.no_grad()
    def _logits(self, input_ids_BT: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if self._model is None:
            self._model = load_reference(Path(self._config.teacher)).to(input_ids_BT.device)
            # The same attention as the student's, so that documents are kept apart alike.
            prepare_decoder(self._model, chunk_tokens=0)
        found: torch.Tensor = self._model(
            input_ids=input_ids_BT, use_cache=False, **inputs
        ).logits.float()
        return found
