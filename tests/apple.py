"""A device that refuses what Apple's GPUs refuse: 64-bit floats, and tensors that lie on the CPU.

It is called meta, because PyTorch lets every operation of that device through; but its tensors have numbers, which are
computed on the CPU. `with device():` makes it; inside, `tensor.to("meta")` goes there and `.cpu()` comes back.
"""
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CROSSES = {"_to_copy", "copy_", "index", "index_put_", "index_put"}  # what may take tensors of two devices


class There(torch.Tensor):
    "A tensor on the device; `here` has its numbers."
    @staticmethod
    def __new__(cls, here: torch.Tensor):
        if here.dtype == torch.float64: raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device="meta")

    def __init__(self, here: torch.Tensor): self.here = here

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None): return there(f, args, kwargs or {})


def there(f, args, kwargs):
    "An operation whose result is on the device if that is asked for, or if one of its tensors is there."
    leaves, name = tree_leaves((args, kwargs)), f.__name__.split(".")[0]
    asked = next((v.type for v in leaves if isinstance(v, torch.device)), None)
    ours = [v for v in leaves if isinstance(v, There)]
    if ours and name not in CROSSES and any(isinstance(v, torch.Tensor) and not isinstance(v, There) and v.ndim for v in leaves):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    inside = lambda v: v.here if isinstance(v, There) else torch.device("cpu") if isinstance(v, torch.device) else v
    out = f(*tree_map(inside, args), **tree_map(inside, kwargs))
    if name.endswith("_") and not name.endswith("__"): return args[0] if isinstance(args[0], There) else out
    if not (asked == "meta" or asked is None and ours): return out
    return tree_map(lambda v: There(v) if isinstance(v, torch.Tensor) else v, out)


class Device(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None): return there(f, args, kwargs or {})


@contextmanager
def device(monkeypatch=None):
    "Inside, the device is this machine's accelerator; with `monkeypatch` the package knows that it has no 64-bit floats."
    if monkeypatch is not None:
        monkeypatch.setattr("lmtrain.batch.WITHOUT_FLOAT64", {"meta"})
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
        monkeypatch.setattr(torch, "inference_mode", torch.no_grad)                    # which no subclass of Tensor can be made in
        monkeypatch.setattr("lmtrain.train.cast_to_bf16", lambda *_: nullcontext())    # PyTorch has none for meta
        monkeypatch.setattr(torch.optim, "AdamW", lambda *a, _of=torch.optim.AdamW, fused=None, **k: _of(*a, **k))  # nor a fused one
        monkeypatch.setattr("accelerate.Accelerator.device", property(lambda self: torch.device("meta")))
    plain = torch.tensor
    def tensor(data, device=None, **k): return plain(data, **k) if device is None else plain(data, **k).to(device)
    torch.tensor = tensor                                  # which would make one without numbers
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied, as on a GPU
    try:
        with Device(): yield "meta"
    finally:
        torch.tensor = plain
        torch.__future__.set_swap_module_params_on_conversion(False)
