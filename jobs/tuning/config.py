"""A sweep as one config: what `jobs.tune` reads. It loads no torch and no Ray.

config = load_config("configs/tune/digits.yaml", TuneConfig, ["num_trials=12"])
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, model_validator

from cluster.config import StrictModel
from jobs.data.config import Name
from jobs.models.config import HIGHER_IS_BETTER, Metric


class Dimension(StrictModel):
    """The values that one field may take; exactly one of these is given."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    choice: tuple[JsonValue, ...] | None = None
    """One of these, drawn at random; a value may be a whole section, say of a schedule."""
    grid: tuple[JsonValue, ...] | None = None
    """All of these, each with every draw of the other fields."""
    uniform: tuple[float, float] | None = None
    """A number from low to high."""
    loguniform: tuple[float, float] | None = None
    """The same, with its logarithm drawn evenly."""
    integers: tuple[int, int] | None = Field(None, alias="int")
    """A whole number from low to high, both included."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, values: Any) -> Any:
        kinds = ", ".join(field.alias or name for name, field in cls.model_fields.items())
        if not isinstance(values, dict) or len(values) != 1 or not {*values} < {*kinds.split(", ")}:
            found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
            raise ValueError(f"expected exactly one of {kinds}; found {found or 'nothing'}")
        (kind,) = values
        if kind in ("uniform", "loguniform", "int") and any(
            isinstance(bound, bool) for bound in _listed(values[kind])
        ):
            raise ValueError(f"{kind} has a truth value for a bound, expected numbers")
        return values

    @model_validator(mode="after")
    def _something_to_draw(self) -> Dimension:
        for listed in (self.choice, self.grid):
            if listed == ():
                raise ValueError("there is nothing to choose from: give at least one value")
        for bounds in (self.uniform, self.loguniform, self.integers):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"low {bounds[0]:g} is not below high {bounds[1]:g}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"low {self.loguniform[0]:g} has no logarithm: give one above 0")
        return self


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else []


class NoScheduler(StrictModel):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class AshaScheduler(StrictModel):
    """Asynchronous successive halving: at each rung only the best share of the trials goes on.

    Rungs are at `grace_steps`, `grace_steps * reduction_factor`, …; a trial is compared at the
    first evaluation at or after one, with those that were there before.
    """

    kind: Literal["asha"]
    grace_steps: int = Field(ge=1)
    """No trial is stopped before."""
    reduction_factor: int = Field(3, ge=2)
    """One in so many goes on."""


class TuneConfig(StrictModel):
    """One sweep: trainings of the same model on the same data, of which the best is registered."""

    name: Name
    """Name of the sweep; its trials are called NAME-001, NAME-002, …"""
    experiment: str = Field("tune", min_length=1)
    """MLflow experiment."""
    train: str | dict[str, JsonValue]
    """What a trial trains: a training config's path, relative to where the job runs, or its keys
    themselves."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Dotted fields of that config, changed for all trials."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted fields of that config, and what each may be."""
    search: Literal["random", "grid"] = "random"
    """random: `num_trials` draws. grid: every combination of choices, grids and whole numbers."""
    num_trials: int | None = Field(None, ge=1, le=1000)
    """For random search. Where there are grids, so many for each of their combinations."""
    scheduler: Annotated[NoScheduler | AshaScheduler, Field(discriminator="kind")] = NoScheduler()
    metric: Metric = "loss"
    """Of the validation split, measured every `evaluate_every_steps` and after the last step."""
    mode: Literal["min", "max"] | None = None
    """None means what is better for that metric."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; None means as many as the cluster has room for."""
    seed: int = Field(0, ge=0)
    """Of the draws; the seed of weights and rows is the training config's."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with this config's sweep, and repeat no trial that has ended. never: start anew.
    """

    @property
    def is_maximised(self) -> bool:
        return self.mode == "max" if self.mode else self.metric in HIGHER_IS_BETTER

    @model_validator(mode="after")
    def _number_of_trials(self) -> TuneConfig:
        if self.search == "random" and self.num_trials is None:
            raise ValueError("search random needs num_trials")
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError("search grid tries every combination: leave num_trials out")
        return self

    @model_validator(mode="after")
    def _grid_is_finite(self) -> TuneConfig:
        for name, dimension in self.space.items():
            if self.search == "grid" and (dimension.uniform or dimension.loguniform):
                raise ValueError(
                    f"search grid cannot try every value of space.{name}: list them as grid: […], "
                    "or use search random"
                )
        return self
