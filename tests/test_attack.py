"""An attack on the embeddings: its steps, what holds while it lasts, and its column in a comparison."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_tiny
from test_compare import lines_of
from test_mitigations import PROMPTS, case_of

from memorization.io.pictures import save_picture
from memorization.mitigations.case import Remedy
from memorization.mitigations.gni import EmbeddingNoise
from memorization.models.decoding import encode
from memorization.runs.attack import Attack
from memorization.similarity import judge
from memorization.studies import mitigation_tradeoff
from memorization.studies.compare import PLAIN, Row
from memorization.studies.compare_report import read_comparison, table_of


@pytest.fixture(scope="module", params=["tiny-eps", "tiny-v"])
def pipe(request):
    return load_tiny(request.param, pictures=True)


@pytest.fixture
def picture(tmp_path):
    save_picture(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), tmp_path / "training.png")
    return tmp_path / "training.png"


def loss_by_hand(pipe, embeds, clean, t, z):
    alpha = pipe.scheduler.alphas_cumprod[t].sqrt().item()
    sigma = (1 - pipe.scheduler.alphas_cumprod[t]).sqrt().item()
    x = alpha * clean + sigma * z
    return (pipe.predict_noise(x, t, embeds) - z).square().sum()


def test_a_step_is_adams_down_the_denoising_loss(pipe, picture):
    """The first step of Adam goes lr against the sign of the gradient of the mean over the draws."""
    case = case_of(pipe)
    found = Attack(steps=1, lr=0.01, draws=2, seed=7)(case, Remedy.unchanged(case), [None, picture, picture]).embeds
    assert torch.equal(found[0], case.embeds[0])  # nothing is known of its training picture
    clean, generator = encode(pipe, [str(picture)]), torch.Generator().manual_seed(7)
    moving, losses = case.embeds[1:2].clone().requires_grad_(), []
    for _ in range(2):
        t = int(torch.randint(pipe.scheduler.config.num_train_timesteps, (), generator=generator))
        losses.append(loss_by_hand(pipe, moving, clean, t, torch.randn(clean.shape[1:], generator=generator)))
    (gradient,) = torch.autograd.grad(sum(losses) / 2, moving)
    clear = gradient.abs() > 1e-3 * gradient.abs().max()
    step = found[1:2] - case.embeds[1:2]
    assert clear.float().mean() > 0.5 and torch.allclose(step[clear], -0.01 * gradient.sign()[clear], atol=1e-4)


def test_it_lowers_the_loss_and_leaves_the_model_alone(pipe, picture):
    case = case_of(pipe, PROMPTS[:1])
    clean, generator = encode(pipe, [str(picture)]), torch.Generator().manual_seed(99)
    found = Attack(steps=10)(case, Remedy.unchanged(case), [picture]).embeds
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    with torch.no_grad():
        draws = [(t, torch.randn(clean.shape[1:], generator=generator)) for t in range(50, 1000, 100)]
        before, after = (sum(loss_by_hand(pipe, e, clean, t, z) for t, z in draws) for e in (case.embeds, found))
    assert after < before


def test_a_prompt_is_attacked_as_if_it_were_alone(pipe, picture):
    case = case_of(pipe, PROMPTS[:2])
    attack, training = Attack(steps=3, lr=0.02), [picture] * 2
    together = attack(case, Remedy.unchanged(case), training).embeds
    apart = attack(replace(case, batch_size=1), Remedy.unchanged(case), training).embeds
    alone = case_of(pipe, PROMPTS[1:2])
    single = attack(alone, Remedy.unchanged(alone), training[:1]).embeds
    assert torch.allclose(together, apart, atol=2e-3) and torch.allclose(together[1], single[0], atol=2e-3)


def test_what_acts_on_the_network_holds_during_the_attack(pipe, picture):
    case, seen = case_of(pipe), []

    @contextmanager
    def around(rows):
        seen.append(rows.tolist())
        hook = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].detach().clone()), with_kwargs=True
        )
        yield
        hook.remove()

    remedy = replace(Remedy.unchanged(case), around=around)
    found = Attack(steps=1, draws=1)(case, remedy, [None, picture, picture])
    assert seen[0] == [2, 4]  # the first row of each prompt, of two noises
    assert torch.equal(seen[1], torch.cat([pipe.embed([""]).expand(2, -1, -1), case.embeds[1:]]))
    plain = Attack(steps=1, draws=1)(case, Remedy.unchanged(case), [None, picture, picture])
    assert torch.allclose(found.embeds, plain.embeds, atol=2e-2) and found.around is around


def test_an_attacked_row_is_a_column():
    base = {"base": "x 1"}
    lines = pd.DataFrame([
        lines_of(PLAIN, [0.5, 1.0], 1, family="a"), lines_of(PLAIN, [1.9, 1.9], 0, item=1),
        lines_of("x 1", [1.1, 1.7], 1, family="a"), lines_of("x 1", [1.9, 1.9], 0, item=1),
        lines_of("x 1, attacked", [0.1, 0.2], 1, family="a", **base),
        lines_of("x 1, attacked", [0.3, 1.9], 0, item=1, **base),
    ])  # fmt: skip
    table = table_of(lines, {"nl2": 1.2}, 100)
    assert table["row"].tolist() == [PLAIN, "x 1"]
    row = table.iloc[1]
    assert row["copies"] == 0.5 and row["copies attacked"] == row["copies attacked low"] == 1
    assert row["ordinary: copies attacked"] == 0.5 and np.isnan(table.iloc[0]["copies attacked"])
    untouched = table_of(lines[lines["base"].isna()].drop(columns="base"), {"nl2": 1.2}, 100)
    assert "copies attacked" not in untouched and untouched["copies"].tolist() == table["copies"].tolist()


def test_rows_that_are_attacked_say_so():
    row = Row("gni 1", "gni").attacked(Attack(steps=2))
    assert row.record()["attack"] == {"steps": 2, "lr": 0.05, "draws": 4, "seed": 0} and row.base == "gni 1"
    assert Row("gni 1", "gni").record() == {"method": "gni", "settings": None}


def test_an_attack_may_be_added_to_a_finished_comparison(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "find_weights", lambda: None)
    monkeypatch.setattr(mitigation_tradeoff, "Attack", lambda: Attack(steps=1, draws=1))
    monkeypatch.setattr(EmbeddingNoise, "strengths", (0.1, 0.3))  # the second is its default, which is attacked
    common = ("--model", "testbed-eps", "--memorized", 1, "--ordinary", 1, "--steps", 3, "--noises", 1, "--methods",
              "gni", "--resamples", 100, "--out", tmp_path)  # fmt: skip
    run_script(mitigation_tradeoff, *common)
    before = (tmp_path / "scores.jsonl").read_bytes()
    run_script(mitigation_tradeoff, *common, "--attack")
    after = (tmp_path / "scores.jsonl").read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 2 * 2
    table = pd.read_csv(tmp_path / "table.csv").set_index("row")
    assert table["copies attacked"].notna().to_dict() == {row: row in (PLAIN, "gni 0.3") for row in table.index}
    assert set(read_comparison(tmp_path)[0]["base"].dropna()) == {PLAIN, "gni 0.3"}
    (tmp_path / "scores.jsonl").write_bytes(after[:-40])
    run_script(mitigation_tradeoff, *common, "--attack")
    again = (tmp_path / "scores.jsonl").read_bytes()
    timeless = [[{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
                 for line in lines.splitlines()] for lines in (after, again)]  # fmt: skip
    assert timeless[0] == timeless[1]
