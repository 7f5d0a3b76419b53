"""A Forge extension: put the folder forge_guard into extensions, with memorization installed beside it.

Tested against a stub of the host's contract; not in Forge itself.
"""

import gradio as gr
from modules import scripts

from memorization.guard.post_guidance import ACTIONS, guard_model


class MemorizationGuard(scripts.Script):
    sorting_priority = 15

    def title(self):
        return "Memorization guard"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, *args, **kwargs):
        with gr.Accordion(open=False, label=self.title()):
            enabled = gr.Checkbox(label="Enabled", value=False)
            threshold = gr.Number(label="Threshold", value=1.0)
            action = gr.Radio(label="Action", choices=list(ACTIONS), value=ACTIONS[0])
        return enabled, threshold, action

    def process_before_every_sampling(self, p, enabled, threshold, action, **kwargs):
        if enabled:
            model = p.sd_model.forge_objects.unet.clone()
            guard_model(model, threshold, action)
            p.sd_model.forge_objects.unet = model
