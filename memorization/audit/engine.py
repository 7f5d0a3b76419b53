"""The engine of an audit: base and epochs, try by try, into a run's folder. It knows no signal or measure by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.audit.adapters import Adapter, Tuned
from memorization.audit.measures.base import Measure
from memorization.audit.signals.base import Look, Signal
from memorization.audit.training import Training
from memorization.audit.tries import Try
from memorization.errors import InputError, printable
from memorization.io.files import writing
from memorization.io.pictures import save_picture, to_tensor
from memorization.mitigations.case import Remedy
from memorization.models.decoding import encode_pixels
from memorization.models.finite import check_finite
from memorization.runs.cases import Cases
from memorization.runs.memory import with_memory
from memorization.runs.sampling import sample
from memorization.runs.store import ResultStore
from memorization.settings import Checked, Count, NotNegative, Seed, Steps
from memorization.similarity.clip import Clip

BASE = "(base)"  # what the lines call the base model; no adapter is called so


@dataclass(frozen=True)
class Plan(Checked):
    """How an audit looks.

    Args:
        noises: a try.
        seed: of all noises.
        steps: of a generation.
        guidance_scale: of a generation.
        batch_size: rows to a UNet call.
    """

    noises: Count
    seed: Seed
    steps: Steps
    guidance_scale: NotNegative
    batch_size: Count


class Audit:
    """What all epochs share.

    Args:
        measures: the first decides which picture of a try is kept.
        clip: judges text alignment.
    """

    def __init__(
        self, tuned: Tuned, training: Training, tries: Sequence[Try], signals: Sequence[Signal],
        measures: Sequence[Measure], plan: Plan, clip: Clip | None = None,
    ) -> None:  # fmt: skip
        self.tuned, self.training, self.tries, self.plan, self.clip = tuned, training, tries, plan, clip
        self.signals, self.measures = signals, measures
        trained = tuned.pipe.scheduler.config.num_train_timesteps
        if late := [signal for signal in signals if signal.timestep >= trained]:
            raise InputError(f"{late[0].name}: the checkpoint was trained on {trained} timesteps, counted from 0")

    def run(self, adapters: Sequence[Adapter], store: ResultStore) -> None:
        """Fill ``store``, which was started, with a line a try, those of the base first, from where it stopped.

        Raises:
            InputError: an adapter does not fit, memory does not suffice, or a number is not finite.
        """
        with writing(store.folder):
            (store.folder / "pictures").mkdir(exist_ok=True)
        with_memory(lambda size: self._run(adapters, store, size), store, self.plan.batch_size)

    def _run(self, adapters: Sequence[Adapter], store: ResultStore, batch_size: int) -> None:
        count, epochs = len(self.tries), [None, *adapters]
        with tqdm(total=len(epochs) * count, initial=store.done, desc=printable(store.name), unit="try",
                  smoothing=0) as bar:  # fmt: skip
            for number, adapter in enumerate(epochs):
                if store.done < (number + 1) * count:
                    bar.set_postfix_str(printable(adapter.name if adapter else BASE))
                    with self.tuned.using(adapter):
                        self._run_epoch(adapter, number * count, store, batch_size, bar)

    def _run_epoch(
        self, adapter: Adapter | None, first: int, store: ResultStore, batch_size: int, bar: tqdm
    ) -> None:  # fmt: skip
        """The lines of an epoch, ``first`` on, that are missing; batches lie on a fixed grid."""
        at_once = max(1, batch_size // self.plan.noises)
        for start in range((store.done - first) // at_once * at_once, len(self.tries), at_once):
            rows, pictures = self._rows(self.tries[start : start + at_once], adapter, batch_size)
            rows = [{"id": first + start + i, **row} for i, row in enumerate(rows)]
            done = store.done - first - start
            for row, picture in zip(rows[done:], pictures[done:], strict=True):
                save_picture(picture, picture_file(store.folder, row["id"]))
            store.append(rows[done:])
            bar.update(len(rows) - done)

    @torch.no_grad()
    def _rows(
        self, tries: Sequence[Try], adapter: Adapter | None, batch_size: int
    ) -> tuple[list[dict], list[np.ndarray]]:
        """A line a try, and the picture that is kept of each."""
        plan, pipe = self.plan, self.tuned.pipe
        noise = torch.stack([pipe.pure_noise(plan.noises, one.seed) for one in tries])
        case = Cases(pipe, noise[0], plan.steps, plan.guidance_scale, plan.seed, batch_size)(
            [one.prompt for one in tries]
        )
        pictures = sample(case, Remedy.unchanged(case, latents=noise))
        measured = self._measured(pictures, case.prompts)
        shown = [self._nearest_of(values) for values in measured]
        signals = self._signalled(tries, noise, batch_size)
        rows = [
            {"epoch": adapter.name if adapter else BASE, "prompt": one.prompt, "kind": one.kind,
             "training": None if one.place is None else self.training.names[one.place],
             **measured[i], **signals[i], "shown": shown[i]}
            for i, one in enumerate(tries)
        ]  # fmt: skip
        return rows, [own[place] for own, place in zip(pictures, shown, strict=True)]

    def _measured(self, pictures: np.ndarray, prompts: Sequence[str]) -> list[dict[str, list]]:
        """Of every try: by measure the value of each picture to its nearest training picture, and which that is."""
        found: list[dict[str, list]] = [{} for _ in prompts]
        flat = pictures.reshape(-1, *pictures.shape[2:])
        for measure in self.measures:
            table = measure(flat)
            nearest = table.argmin(1) if measure.lower_is_nearer else table.argmax(1)
            values = table[np.arange(len(table)), nearest]
            check_finite(torch.from_numpy(values), measure.name)
            for i, row in enumerate(found):
                own = slice(i * self.plan.noises, (i + 1) * self.plan.noises)
                row[measure.name] = [round(float(value), 4) for value in values[own]]
                row[f"{measure.name}_nearest"] = nearest[own].tolist()
        if self.clip:
            for row, prompt, own in zip(found, self.clip.prompts(prompts), pictures, strict=True):
                row["alignment"] = [round(value, 4) for value in (self.clip.pictures(own) @ prompt).tolist()]
        return found

    def _nearest_of(self, values: Mapping[str, list]) -> int:
        """Which picture of a try is nearest to a training picture."""
        first = self.measures[0]
        own = values[first.name]
        return own.index(min(own) if first.lower_is_nearer else max(own))

    def _signalled(self, tries: Sequence[Try], noise: Tensor, batch_size: int) -> list[dict[str, list[float]]]:
        """Of every try that is a training caption, by signal a value a noise."""
        asked = [i for i, one in enumerate(tries) if one.kind == "caption"]
        found: list[dict[str, list[float]]] = [{} for _ in tries]
        if not asked:
            return found
        prompts, own = [tries[i].prompt for i in asked], noise[asked]
        places = [tries[i].place for i in asked]
        looks: dict[tuple[str, int], tuple[Look, Look]] = {}
        for signal in self.signals:
            key = (signal.on, signal.timestep)
            if key not in looks:
                clean = self._latents(places) if signal.on == "picture" else None
                tuned = look(self.tuned.pipe, prompts, own, signal.timestep, clean, batch_size)
                with self.tuned.alone() as base:
                    looks[key] = tuned, look(base, prompts, own, signal.timestep, clean, batch_size)
            values = signal(*looks[key])
            check_finite(values, signal.name, prompts)
            for i, row in zip(asked, values.tolist(), strict=True):
                found[i][signal.name] = [float(f"{value:.6g}") for value in row]
        return found

    def _latents(self, places: Sequence[int | None]) -> Tensor:
        """The base's latents of training pictures, ``(n, 1, c, h, w)``."""
        pictures = np.stack([self.training.pictures[place] for place in places if place is not None])
        return encode_pixels(self.tuned.base.pipe.vae, to_tensor(pictures))[:, None]


def picture_file(folder: Path, number: int) -> Path:
    """The picture that is kept of a line: of its noises the one that is nearest to a training picture."""
    return folder / "pictures" / f"{number:06d}.png"


def look(
    pipe: LocalStableDiffusionPipeline, prompts: Sequence[str], noise: Tensor, timestep: int, clean: Tensor | None,
    batch_size: int,
) -> Look:  # fmt: skip
    """What a model predicts for prompts on their own ``noise (prompts, noises, c, h, w)``, or on ``clean`` noised by
    it."""
    alpha, sigma = pipe.noise_scales(timestep)
    latents = noise if clean is None else alpha * clean + sigma * noise
    rows = latents.flatten(0, 1)

    def clean_latents(embeds: Tensor) -> Tensor:
        each = embeds.expand(len(prompts), -1, -1).repeat_interleave(noise.shape[1], 0)
        chunks = zip(rows.split(batch_size), each.split(batch_size), strict=True)
        eps = torch.cat([pipe.predict_noise(x, timestep, e) for x, e in chunks])
        return ((rows - sigma * eps) / alpha).view_as(noise)

    cond, uncond = clean_latents(pipe.embed(prompts)), clean_latents(pipe.embed([""]))
    return Look(cond, uncond, torch.zeros_like(noise[:, :1]) if clean is None else clean)
