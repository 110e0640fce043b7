"""The extension. Importing it registers torch.ops.sam_fused, whose operators it has too: csrc/ops.h says what they do.

They change the tensors of ``params``, ``backups``, ``state`` and ``steps``, and ``total``, in place. ``run_sizes``
says how many of ``params``, one after the other, belong to each row of ``ascent`` (rho, eta, adaptive) or ``hyper``,
which are float64 on the CPU. ``hook`` is called at the moment that csrc/ops.h says.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_Hook = Callable[[], object] | None

has_cuda: bool

def grad_sq_norm(
    params: list[Tensor], grads: list[Tensor], ascent: Tensor, run_sizes: list[int], hook: _Hook = None
) -> Tensor: ...
def sharpness_(
    sq_norms: Tensor, ascent: Tensor, total: Tensor | None = None, grad_scale: Tensor | None = None, hook: _Hook = None
) -> Tensor: ...
def perturb_(
    params: list[Tensor],
    grads: list[Tensor],
    backups: list[Tensor],
    grad_norm: Tensor,
    ascent: Tensor,
    run_sizes: list[int],
    hook: _Hook = None,
) -> None: ...
def perturb_from_(
    params: list[Tensor],
    directions: list[Tensor],
    saved: list[Tensor],
    norm: Tensor,
    ascent: Tensor,
    run_sizes: list[int],
    hook: _Hook = None,
) -> None: ...
def restore_(params: list[Tensor], backups: list[Tensor], hook: _Hook = None) -> None: ...
def restore_step_(
    base: str,
    params: list[Tensor],
    grads: list[Tensor],
    backups: list[Tensor | None],
    state: list[Tensor],
    steps: list[Tensor],
    hyper: Tensor,
    run_sizes: list[int],
    lr: list[Tensor | None],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    hook: _Hook = None,
) -> None: ...
def step_along_(
    base: str,
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    steps: list[Tensor],
    hyper: Tensor,
    ascent: Tensor,
    moment: int,
    run_sizes: list[int],
    lr: list[Tensor | None],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    hook: _Hook = None,
) -> Tensor: ...
def gather(groups: list[list[Tensor]], /) -> tuple[list[Tensor], int, int]:
    """The gradients that are not None, a hash of what a plan depends on, and one of where the parameters lie."""

def contents(state: dict[Any, Any], /) -> int:
    """A hash of which objects a dictionary of dictionaries holds."""

def versions(lists: list[list[Tensor]], /) -> list[int]:
    """How often each tensor of each list was changed in place."""

def cpu_isa() -> str:
    """The instruction set in use on the CPU."""

def set_cpu_isa(name: str, /) -> None:
    """Raises ValueError if this CPU cannot run it."""
