"""The extension. Importing it registers torch.ops.sam_fused, whose operators it has on rows: see csrc/ops.h.

They change the tensors that the rows were given, and ``total``, in place. ``ascent`` (rho, eta, adaptive) and
``hyper`` have a row for each run of parameters, and are float64 on the CPU. ``hook`` is called at the moment that
csrc/ops.h says.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_Hook = Callable[[], object] | None

has_cuda: bool

class Gradients:
    """Gradients as :func:`gather` has found them; operators take them, or a list, for ``grads``."""

    def pick(self, positions: list[int]) -> Gradients: ...
    def tensors(self) -> list[Tensor]: ...
    def __len__(self) -> int: ...

_Reads = Gradients | list[Tensor]

class Rows:
    """What an operator works on, checked: parameters, and for each what the operator wants beside its gradient.

    ``run_sizes`` says how many of ``params``, one after the other, belong to each run. ``backups`` are to be written,
    ``saved`` are to be read (None: was not perturbed); ``state`` has ``base``'s state lists one after the other.
    """

    def __init__(
        self,
        params: list[Tensor],
        run_sizes: list[int],
        backups: list[Tensor] | None = None,
        saved: list[Tensor | None] | None = None,
        base: str = "",
        state: list[Tensor] = ...,
        steps: list[Tensor] = ...,
    ) -> None: ...
    @property
    def lasting(self) -> bool:
        """Whether they can be used again, as long as no tensor changes its memory, layout, dtype or device."""

def grad_sq_norm(rows: Rows, grads: _Reads, ascent: Tensor) -> Tensor: ...
def sharpness_(
    sq_norms: Tensor, ascent: Tensor, out: Tensor, total: Tensor | None = None, grad_scale: Tensor | None = None
) -> None: ...
def perturb_(rows: Rows, grads: _Reads, grad_norm: Tensor, ascent: Tensor, hook: _Hook = None) -> None: ...
def perturb_from_(rows: Rows, directions: _Reads, norm: Tensor, ascent: Tensor) -> None: ...
def restore_(rows: Rows) -> None: ...
def restore_step_(
    rows: Rows,
    grads: _Reads,
    hyper: Tensor,
    lr: list[Tensor | None] = ...,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    hook: _Hook = None,
) -> None: ...
def step_along_(
    rows: Rows,
    grads: _Reads,
    hyper: Tensor,
    ascent: Tensor,
    moment: int,
    lr: list[Tensor | None] = ...,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor: ...
def gather(groups: list[list[Tensor]], /) -> tuple[Gradients, int, int]:
    """The gradients that are not None, a hash of what a plan depends on, and one of where the parameters lie."""

def contents(state: dict[Any, Any], /) -> int:
    """A hash of which objects a dictionary of dictionaries holds, and of the tensors' layout and memory."""

def marks(lists: list[list[Tensor]], /) -> bytes:
    """How often each tensor of each list was changed in place, and its address: 16 bytes each."""

def cpu_isa() -> str:
    """The instruction set in use on the CPU."""

def set_cpu_isa(name: str, /) -> None:
    """Raises ValueError if this CPU cannot run it."""
