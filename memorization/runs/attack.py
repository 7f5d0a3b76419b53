"""Does a mitigation hold? An attack that looks, from the mitigated prompt, for the training picture.

Finding DoRI (ICML 2026, arXiv 2507.16880): some Adam steps on the prompt's embedding, down the denoising loss of the
training picture's latents z0 under the mitigated model; then pictures are generated as before. Copies that come back
were hidden, not gone.

    mean over t and z of || eps(alpha_t z0 + sigma_t z, e) - z ||^2,   e the embedding

Deviations: their learning rate and number of draws were not at hand. t is uniform over the training schedule, drawn
anew at every step, the same for every prompt. What a mitigation does to the network (attention, neurons) holds during
the attack; what it does to guidance and start noise holds in the generation alone, where the loss does not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from memorization.mitigations.case import Case, Remedy
from memorization.models.decoding import encode
from memorization.settings import Checked, Count, Positive, Seed


@dataclass(frozen=True)
class Attack(Checked):
    """How the embedding is attacked.

    Args:
        steps, lr: of Adam.
        draws: of t and z, a step.
        seed: of the draws.
    """

    steps: Count = 50
    lr: Positive = 0.05
    draws: Count = 4
    seed: Seed = 0

    def __call__(self, case: Case, remedy: Remedy, training: Sequence[Path | None]) -> Remedy:
        """The remedy with other embeddings; a prompt whose training picture is not known keeps its own.

        Args:
            training: file of each prompt's training picture, or None.

        Raises:
            InputError: a file is no picture.
        """
        known = [i for i, path in enumerate(training) if path is not None]
        embeds = remedy.embeds.clone()
        at_once = max(1, case.batch_size // 2)
        for start in range(0, len(known), at_once):
            chosen = known[start : start + at_once]
            clean = encode(case.pipe, [str(training[i]) for i in chosen])
            embeds[chosen] = self.embeds(case, remedy, torch.tensor(chosen, device=embeds.device), clean)
        return replace(remedy, embeds=embeds)

    def embeds(self, case: Case, remedy: Remedy, chosen: Tensor, clean: Tensor) -> Tensor:
        """Embeddings ``(n, tokens, width)`` of the prompts numbered ``chosen (n,)``, attacked towards ``clean``.

        Args:
            clean: scaled latents of their training pictures, ``(n, c, h, w)``.
        """
        pipe, generator = case.pipe, torch.Generator().manual_seed(self.seed)
        moving = remedy.embeds[chosen].detach().float().clone().requires_grad_()
        optimizer = torch.optim.Adam([moving], lr=self.lr)
        trained = pipe.scheduler.config.num_train_timesteps

        def eps(x: Tensor, t: int) -> Tensor:
            if remedy.around is None:
                return pipe.predict_noise(x, t, moving)
            pairs = torch.cat([empty.expand_as(moving), moving])  # what acts around a generation knows its halves
            return pipe.predict_noise(x.repeat(2, 1, 1, 1), t, pairs).chunk(2)[1]

        with torch.no_grad():
            empty = pipe.embed([""]).float()
        with remedy.around(chosen * len(case.noise)) if remedy.around else nullcontext():
            for _ in range(self.steps):
                moving.grad = torch.zeros_like(moving)
                for _ in range(self.draws):
                    t = int(torch.randint(trained, (), generator=generator))
                    z = torch.randn(clean.shape[1:], generator=generator).to(clean.device)
                    alpha, sigma = pipe.noise_scales(t)
                    loss = (eps(alpha * clean + sigma * z, t) - z).square().sum()
                    moving.grad += torch.autograd.grad(loss, moving)[0] / self.draws
                optimizer.step()
        return moving.detach()
