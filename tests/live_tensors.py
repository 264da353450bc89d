"""How many bytes of tensors live at a time, counted operation by operation: of any device, and the same every time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts what operations make while it is entered; what a kernel takes for itself is not seen.

    Args:
        known: tensors that are there before, and not counted.

    Attributes:
        bytes, most: of the storages that live, and the most there were at a time.
    """

    def __init__(self, *known):
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.most = max(self.most, self.bytes)
        return result

    def count(self, storage):
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, identity, size):
        self.storages.discard(identity)
        self.bytes -= size
