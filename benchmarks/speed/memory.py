"""Memory of tensors, counted where it is made: the CPU's allocator tells nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the tensors that are made inside, each storage once.

    Attributes:
        peak: most bytes that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}
        self._most = 0  # bytes of all that is in the table, which some have left by now
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its results."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage, size = StorageWeakRef(leaf.untyped_storage()), leaf.untyped_storage().nbytes()
                self._most += size - self._made.get(storage, 0)
                self._made[storage] = size
        if self._most > self.peak:  # only then is it worth a look at what is still there
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that are still there."""
        self._made = {storage: size for storage, size in self._made.items() if not storage.expired()}
        self._most = sum(self._made.values())
        return self._most
