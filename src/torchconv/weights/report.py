"""What a state dict and a module have in common, as a table that one can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class LoadReport:
    """Outcome of loading: names that fitted, and those that did not.

    Attributes:
        loaded: names that were loaded.
        missing: in the module, not in the file.
        unexpected: in the file, not in the module.
        mismatched: name → (shape in the file, shape in the module).
    """

    loaded: list[str]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Everything fitted."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors fit"]
        rows = [("missing", n, "in the network, not in the file") for n in self.missing]
        rows += [("unexpected", n, "in the file, not in the network") for n in self.unexpected]
        rows += [
            ("shape", n, f"{theirs} in the file, {ours} in the network")
            for n, (theirs, ours) in self.mismatched.items()
        ]
        shown = rows[:30]
        width = max((len(n) for _, n, _ in shown), default=0)
        lines += [f"  {kind:<11}{name:<{width}}  {what}" for kind, name, what in shown]
        if len(rows) > len(shown):
            lines.append(f"  … and {len(rows) - len(shown)} more")
        return "\n".join(lines)


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def compare_states(
    module: nn.Module, state: Mapping[str, Tensor], ignore: Callable[[str], bool] = _optional
) -> LoadReport:
    """Compare names and shapes; names that ``ignore`` picks may be absent on either side."""
    own = module.state_dict()
    mismatched = {
        n: (tuple(t.shape), tuple(own[n].shape)) for n, t in state.items() if n in own and t.shape != own[n].shape
    }
    return LoadReport(
        [n for n in state if n in own and n not in mismatched],
        [n for n in own if n not in state and not ignore(n)],
        [n for n in state if n not in own and not ignore(n)],
        mismatched,
    )


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Load a state dict into a module; nothing is loaded when ``strict`` and something does not fit.

    Args:
        module: changed in place.
        state: tensors by name.
        strict: refuse a state that does not fit whole; otherwise what fits is loaded.

    Raises:
        ValueError: ``strict`` and something is missing, unexpected or of another shape; the message is the table.
    """
    report = compare_states(module, state)
    if strict and not report.complete:
        raise ValueError(f"state does not fit {type(module).__name__}: {report}")
    module.load_state_dict({n: state[n] for n in report.loaded}, strict=False)
    return report
