"""A ComfyUI node: put this folder into ComfyUI/custom_nodes, with memorization installed beside it.

Tested against a stub of the host's contract; not in ComfyUI itself.
"""

from memorization.guard.post_guidance import ACTIONS, guard_model


class MemorizationGuard:
    """Model in, guarded model out; the threshold is that of the sampler's first sigma."""

    CATEGORY = "model_patches"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        threshold = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1000.0, "step": 0.001})
        return {"required": {"model": ("MODEL",), "threshold": threshold, "action": (list(ACTIONS),)}}

    def patch(self, model, threshold, action):
        guarded = model.clone()
        guard_model(guarded, threshold, action)
        return (guarded,)


NODE_CLASS_MAPPINGS = {"MemorizationGuard": MemorizationGuard}
NODE_DISPLAY_NAME_MAPPINGS = {"MemorizationGuard": "Memorization guard"}
