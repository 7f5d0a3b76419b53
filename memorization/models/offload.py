"""Networks that wait in the machine's memory and come to the device when they are called: for models too large for it.

``model``: a whole network at a time, the text encoders or the denoiser; ``group``: a layer at a time, by diffusers'
group offloading, with the next one on its way meanwhile (CUDA). Autoencoders stay on the device: they are small, and
called by other names than their own. What is computed is the same, with the same numbers, so scores are.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from memorization.errors import InputError

Offload = Literal["none", "model", "group"]
WAITING = torch.device("cpu")


def check_offload(offload: Offload, device: torch.device) -> None:
    """See that there is another place than the one where networks wait.

    Raises:
        InputError: there is none, or no such way.
    """
    if offload not in get_args(Offload):
        raise InputError(f"offload = {offload!r}: is none of {', '.join(get_args(Offload))}")
    if offload != "none" and device.type == WAITING.type:
        raise InputError(f"--offload {offload}: {device} is where offloaded networks wait; it needs a card")


def put(pipe: Any, device: torch.device, offload: Offload) -> None:
    """Put the networks of a pipeline of diffusers where they are used, or where they wait for it.

    Raises:
        InputError: diffusers cannot offload one of them so.
    """
    if offload == "none":
        pipe.to(device)
        return
    pipe.onload, turns = device, _Turns(device)
    for network in (one for one in pipe.components.values() if isinstance(one, nn.Module)):
        if hasattr(network, "decode"):
            network.to(device)
        elif offload == "model":
            add_hook_to_module(network, turns)
        else:
            _in_layers(network, device)


class _Turns(ModelHook):
    """Brings a network to the device when it is called, and the one that was there before it away.

    Unlike diffusers' own, it needs no order in which networks are called: prompts are encoded again after the denoiser.
    """

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device  # by this name: diffusers asks the hooks where a pipeline computes
        self.here: nn.Module | None = None

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to(WAITING)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.here is not module:  # weights must not be set, not even to what they are, while derivatives are taken
            if self.here is not None:
                self.here.to(WAITING)
                self.here = None
                clear_device_cache()
            self.here = module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def _in_layers(network: nn.Module, device: torch.device) -> None:
    if not getattr(network, "_supports_group_offloading", True):
        raise InputError(f"--offload group: diffusers has none for {type(network).__name__}; give --offload model")
    apply_group_offloading(
        network, onload_device=device, offload_device=WAITING, offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )  # fmt: skip
    network.register_forward_pre_hook(_refuse_derivatives, with_kwargs=True)


def _refuse_derivatives(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A layer's weights have left the device when gradients come back through it, and torch crashes where weights are
    set while it takes derivatives in forward mode."""
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    backward = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    if backward or any(unpack_dual(one).tangent is not None for one in given):
        raise InputError(
            "--offload group: what was asked for takes derivatives of the denoiser, for which all of its layers have "
            "to be there; give --offload model, or other methods"
        )
