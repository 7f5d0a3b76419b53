"""A page that draws under the guard: python examples/guard_demo.py [MODEL] [THRESHOLDS.yaml]; needs the extra demo."""

import sys

import gradio as gr
import torch

import memorization as mem
from memorization.guard import Refused, protect

ACTIONS = ("warn", "reseed", "mitigate", "blank", "refuse")


def page(pipe, threshold, **options) -> gr.Blocks:
    """The page; ``options`` are those of the pipeline's call."""

    def draw(prompt: str, action: str, count: float, seed: float):
        generator = torch.Generator().manual_seed(int(seed))
        with protect(pipe, threshold, action=action) as guard:
            try:
                images = pipe(prompt, num_images_per_prompt=int(count), generator=generator, **options).images
            except Refused:
                images = []
            return images, "\n".join(map(str, guard.verdicts))

    with gr.Blocks(title="Memorization guard") as blocks:
        prompt, action = gr.Textbox(label="Prompt"), gr.Radio(ACTIONS, value="warn", label="If a picture is flagged")
        count, seed = gr.Slider(1, 8, 4, step=1, label="Pictures"), gr.Number(0, label="Seed", precision=0)
        button = gr.Button("Draw", variant="primary")
        gallery, verdicts = gr.Gallery(label="Pictures", columns=4), gr.Textbox(label="Verdicts", lines=4)
        button.click(draw, [prompt, action, count, seed], [gallery, verdicts], concurrency_limit=1)
    return blocks


def main(name: str = "testbed-eps", threshold: str = "1.0") -> None:
    model = mem.load(name)
    known = float(threshold) if threshold.replace(".", "", 1).isdigit() else threshold
    page(model.pipe, known, num_inference_steps=50, guidance_scale=model.spec.scale).launch()


if __name__ == "__main__":
    main(*sys.argv[1:])
