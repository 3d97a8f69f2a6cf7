"""What one worker holds of the weights and the optimizer, whatever divides them among workers.

A `Holding` says which range of which parameter lies where in a tensor that the optimizer steps; the
tensors of its state have the same shape, so they divide alike. `deepspeed_state` finds the holdings
of DeepSpeed's engines. It knows nothing of DeepSpeed itself.

    state = ShardedState(holdings, optimizer, refresh)
    tensors, ranges = state.share(copy=0, num_copies=2)
    state.load(files)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from jobs.training.fragments import BUFFER, MASTER, FragmentFiles
from jobs.training.manifest import Range

# 0-dimensional; what is a Python number comes back as one.
_NUMBERS = {torch.int64, torch.float64}


@dataclass(frozen=True)
class Holding:
    """The range [start, start + numel) of a flattened parameter, within what is stepped."""

    parameter: str
    start: int
    numel: int
    stepped: torch.Tensor
    """A tensor of the optimizer: the parameter, its fp32 copy, or a flat tensor of many."""
    offset: int = 0
    """Where in `stepped`, flattened, the range begins."""

    @property
    def span(self) -> Range:
        return self.start, self.start + self.numel

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """This range of a tensor that divides as `stepped` does; a view."""
        return values.detach().view(-1)[self.offset : self.offset + self.numel]

    def cut(self, low: int, high: int) -> Holding:
        """A part of it, counted from its own start."""
        return Holding(
            self.parameter, self.start + low, high - low, self.stepped, self.offset + low
        )


@dataclass(frozen=True)
class ShardedState:
    """Weights, optimizer state and buffers of one worker."""

    holdings: Sequence[Holding]
    optimizer: torch.optim.Optimizer
    refresh: Callable[[], None]
    """Makes the model's own weights what the stepped ones are; all workers call it together."""
    is_divided: bool
    """Whether copies of the model hold different ranges; otherwise each one holds everything."""
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, Range]:
        """What is needed to load it."""
        return {holding.parameter: holding.span for holding in self.holdings} | {
            name: (0, buffer.numel()) for name, buffer in self.buffers.items()
        }

    def share(self, copy: int, num_copies: int) -> tuple[dict[str, torch.Tensor], dict[str, Range]]:
        """What the worker of a copy saves: tensors by kind and parameter, and their ranges."""
        holdings = self.holdings
        if not self.is_divided:
            holdings = _divide(holdings, copy, num_copies)
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, Range] = {}
        for holding in holdings:
            ranges[holding.parameter] = holding.span
            for kind, values in self._values_of(holding).items():
                tensors[f"{kind}/{holding.parameter}"] = values
        for name, buffer in self.buffers.items() if copy == 0 else ():
            ranges[name] = (0, buffer.numel())
            tensors[f"{BUFFER}/{name}"] = buffer.detach().reshape(-1)
        return tensors, ranges

    def load(self, files: FragmentFiles) -> None:
        """Take over what files hold; all workers call it together."""
        stepped: dict[int, list[Holding]] = {}
        for holding in self.holdings:
            weights = holding.part_of(holding.stepped)
            files.read(MASTER, holding.parameter, holding.span, weights)
            stepped.setdefault(id(holding.stepped), []).append(holding)
        for holdings in stepped.values():
            self._load_optimizer(holdings, files)
        for name, buffer in self.buffers.items():
            flat = buffer.detach().reshape(-1)
            files.read(BUFFER, name, (0, buffer.numel()), flat)
            buffer.detach().copy_(flat.view(buffer.shape))
        self.refresh()

    def _values_of(self, holding: Holding) -> dict[str, torch.Tensor]:
        """By kind: the weights, and what the optimizer keeps of them."""
        found = {MASTER: holding.part_of(holding.stepped)}
        for kind, value in self.optimizer.state.get(holding.stepped, {}).items():
            if not isinstance(value, torch.Tensor):
                if isinstance(value, int | float):
                    found[kind] = torch.tensor(value, dtype=_number_type(value))
            elif value.dim() == 0:
                found[kind] = value
            else:
                assert value.shape == holding.stepped.shape, f"{kind} does not divide like weights"
                found[kind] = holding.part_of(value)
        return found

    def _load_optimizer(self, holdings: Sequence[Holding], files: FragmentFiles) -> None:
        """The state of one stepped tensor, from that of the parameters in it."""
        stepped = holdings[0].stepped
        state = self.optimizer.state[stepped]
        kinds = set[str]().union(*(files.kinds(one.parameter, one.span) for one in holdings))
        for kind in kinds - {MASTER}:
            samples = [files.sample(kind, one.parameter, one.span) for one in holdings]
            known = [sample for sample in samples if sample is not None]
            if known[0].dim() == 0:
                # They differ only if some parameter has had no gradient yet.
                state[kind] = self._settled(max(known), stepped)
                continue
            if getattr(state.get(kind), "shape", None) != stepped.shape:
                state[kind] = torch.zeros_like(stepped, dtype=known[0].dtype, requires_grad=False)
            for one in holdings:
                files.read(kind, one.parameter, one.span, one.part_of(state[kind]))
        for kind in [kind for kind in state if kind not in kinds]:
            del state[kind]

    def _settled(self, scalar: torch.Tensor, stepped: torch.Tensor) -> torch.Tensor | float:
        """A scalar of the state as this optimizer wants it."""
        if scalar.dtype in _NUMBERS:
            return scalar.item()
        # Fused optimizers keep theirs beside the weights, the others on the host.
        is_beside = any(self.optimizer.defaults.get(name) for name in ("fused", "capturable"))
        return scalar.to(stepped.device) if is_beside else scalar


def _number_type(value: float) -> torch.dtype:
    return torch.int64 if isinstance(value, int) else torch.float64


def _divide(holdings: Sequence[Holding], share: int, num_shares: int) -> list[Holding]:
    """An equal share of what every copy holds."""
    total = sum(holding.numel for holding in holdings)
    first, last = total * share // num_shares, total * (share + 1) // num_shares
    found = []
    position = 0
    for holding in holdings:
        low, high = max(first - position, 0), min(last - position, holding.numel)
        if low < high:
            found.append(holding.cut(low, high))
        position += holding.numel
    return found
