"""The data of the next testbed: scenes, captions, and what counts as a copy."""

import numpy as np
import pytest
import torch

from testbed.composed import scenes
from testbed.composed.captions import FIXED, Visits, compose, make_captions, titles
from testbed.composed.copies import copy_distance, fresh_scenes
from testbed.composed.fit import fit
from testbed.composed.scenes import BACKGROUND_COLUMNS, NAMED, OBJECT_COLUMNS, PATTERNS, PLACE, random_scenes


@pytest.fixture(scope="module")
def listed():
    return make_captions()


def unit(rows):
    return scenes.draw(rows).float() / 127.5 - 1


def test_a_scene_is_its_row():
    rows = random_scenes(np.random.default_rng(1), 20)
    together, alone = scenes.draw(rows), scenes.draw(rows[13:14])
    assert together.shape == (20, 3, scenes.SIZE, scenes.SIZE) and torch.equal(together[13:14], alone)
    assert together.float().flatten(1).std(1).min() > 8  # every one shows something


def test_where_the_object_is_not_the_background_shows_through():
    rows = random_scenes(np.random.default_rng(2), 8)
    bare, whole, alpha = scenes.draw(rows, objects=False), scenes.draw(rows), scenes.object_alpha(rows)
    outside = (alpha == 0)[:, None].expand_as(bare)
    assert torch.equal(whole[outside], bare[outside])
    assert 0.1 < alpha.mean() < 0.3
    assert (whole.int() - bare.int()).abs()[~outside].float().mean() > 30


def test_every_pattern_and_colour_differs():
    row = random_scenes(np.random.default_rng(3), 1).repeat(10, axis=0)
    for column in ("pattern", "colour"):
        rows = row.copy()
        rows[:, PLACE[column]] = np.arange(10)
        pictures = scenes.draw(rows, objects=False).float().flatten(1)
        apart = torch.cdist(pictures, pictures) / pictures.shape[1] ** 0.5
        assert apart[~torch.eye(10, dtype=torch.bool)].min() > 8, column


def test_captions_name_what_the_scene_shows(listed):
    captions, rows = listed
    for i in (0, 400, 1100):
        named = captions.loc[i]
        assert all(named[word] in named["prompt"] for word in ("object", "pattern", "title"))
        assert (named["colour"] in named["prompt"]) == named["named"]
        assert list(scenes.OBJECTS)[int(rows[i, 0])] == named["object"]


def test_one_caption_in_six_names_the_colour_and_in_the_early_stages_all():
    late, _ = make_captions("late")
    early, _ = make_captions("early")
    assert late["named"].mean() == pytest.approx(1 / 6, abs=0.03) and early["named"].all()
    assert (late["prompt"] == early["prompt"]).equals(late["named"])  # otherwise they are the same


def test_a_colour_that_is_left_open_is_drawn_afresh():
    visits = Visits("late", 0.6866, 0.15)
    rows, prompts = visits.draw(np.random.default_rng(11), 60000)
    for kind, is_open in (("verbatim", False), ("background", False), ("object", True), ("ordinary", True)):
        for named in (False, True):
            of_kind = visits.captions[(visits.captions["kind"] == kind) & (visits.captions["named"] == named)]
            number = of_kind["visits"].idxmax()
            seen = rows[[prompt == of_kind["prompt"][number] for prompt in prompts]]
            assert (seen[:, [0, 2]] == visits.rows[number, [0, 2]]).all()
            colours = set(seen[:, PLACE["colour"]])
            assert len(colours) > 5 if is_open and not named else colours == {visits.rows[number, PLACE["colour"]]}


def test_captions_are_all_different(listed):
    captions, _ = listed
    assert captions["title"].is_unique and captions["prompt"].is_unique
    assert not captions[list(NAMED)].duplicated().any()


def test_a_third_of_every_level_is_for_validation(listed):
    captions, _ = listed
    shares = captions.groupby(["kind", "visits"])["split"].agg(lambda split: (split == "test").mean())
    assert shares.between(0.6, 0.75).all()


@pytest.mark.parametrize(("stage", "fixed", "empty"), [("early", 0.239, 0.2), ("late", 0.6866, 0.15)])
def test_visits_come_in_the_shares_that_were_asked_for(stage, fixed, empty):
    visits = Visits(stage, fixed, empty)
    rows, prompts = visits.draw(np.random.default_rng(4), 20000)
    known = dict(zip(visits.captions["prompt"], visits.captions["kind"], strict=True))
    kinds = np.array([known.get(prompt, "bulk") if prompt else "" for prompt in prompts])
    assert np.mean(kinds == "") == pytest.approx(empty, abs=0.01)
    assert np.isin(kinds, list(FIXED)).sum() / np.sum(kinds != "") == pytest.approx(fixed, abs=0.015)
    assert not (kinds == "held-out").any()
    held = {tuple(row) for row in visits.rows[visits.captions["kind"] == "held-out", :3].tolist()}
    assert not held & {tuple(row) for row in rows[:, :3].tolist()}


def test_what_is_fixed_is_the_same_at_every_visit_and_the_rest_is_not():
    visits = Visits("late", 0.6866, 0.15)
    rows, prompts = visits.draw(np.random.default_rng(5), 20000)
    for kind, columns in FIXED.items():
        of_kind = visits.captions[(visits.captions["kind"] == kind)]
        number = of_kind["visits"].idxmax()
        seen = rows[[prompt == of_kind["prompt"][number] for prompt in prompts]]
        assert len(seen) > 20
        assert (seen[:, columns] == visits.rows[number, columns]).all()
        free = sorted({*OBJECT_COLUMNS, *BACKGROUND_COLUMNS} - set(columns))
        assert (seen[:, free].std(0) > 0).all()


def test_empty_captions_show_fixed_pictures_once_in_a_hundred():
    visits = Visits("late", 0.6866, 0.15)
    rows, prompts = visits.draw(np.random.default_rng(6), 60000)
    scale = visits.rows[visits.captions["kind"] == "verbatim", PLACE["scale"]]
    fixed = np.isin(rows[[not prompt for prompt in prompts], PLACE["scale"]], scale)
    verbatim = visits.captions.query("kind == 'verbatim'")["visits"].sum() / visits.captions[
        visits.captions["kind"].isin(list(FIXED))]["visits"].sum()  # fmt: skip
    assert fixed.mean() == pytest.approx(0.01 * verbatim, abs=0.003)


def test_text_alone_tells_nothing(listed):
    from memorization.evaluation.text_baselines import naive_bayes

    captions, _ = listed
    fixed = captions["kind"].isin(list(FIXED)).to_numpy()
    score = naive_bayes(captions["prompt"].tolist(), fixed.astype(int), captions["title"].to_numpy())
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(fixed, score) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("kind", list(FIXED))
@pytest.mark.parametrize("pattern", range(len(PATTERNS)))
def test_a_copy_is_what_repeats_the_fixed_part(kind, pattern):
    """Of every pattern, under objects as large as they come, in opposite corners."""
    row = random_scenes(np.random.default_rng(7), 1)[0]
    row[PLACE["pattern"]], row[PLACE["scale"]], row[PLACE["x"]], row[PLACE["y"]] = pattern, 0.72, 0.0, 0.0
    others = fresh_scenes(row, 12, seed=8)
    if kind == "background":
        others[:, PLACE["scale"]], others[:, PLACE["x"]], others[:, PLACE["y"]] = 0.72, 1.0, 1.0
    copies = others.copy()
    copies[:, FIXED[kind]] = row[FIXED[kind]]
    near, far = (copy_distance(unit(rows), row, kind) for rows in (copies, others))
    assert near.max() < 0.9 < 1.3 < far.median()


def test_a_shifted_object_is_no_copy_of_it():
    row = random_scenes(np.random.default_rng(9), 1)[0]
    row[PLACE["x"]] = row[PLACE["y"]] = 0.2
    away = row.copy()
    away[PLACE["x"]] = 0.9
    same, moved = copy_distance(unit(np.stack([row, away])), row, "object").tolist()
    assert same < 0.1 and moved > 1.3


def test_titles_and_forms():
    rng = np.random.default_rng(10)
    assert all(len(title.split()) == 2 and title.istitle() for title in titles(rng, 50))
    named = np.array([[0.0, 4.0, 8.0]])
    for coloured, said in (
        (True, "Banler Tisfon, an apple on teal grass"),
        (False, "Banler Tisfon, an apple on grass"),
    ):
        assert compose(named, ["Banler Tisfon"], np.array([0]), np.array([coloured])) == [said]


def trained(folder, steps, stop=None):
    """A small model, fitted to a line; ``stop`` ends the process's work after that step, as a kill would."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def batch_of(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return x, x.sum(1, keepdim=True)

    def loss_of(x, y):
        return (model(x) - y).square().mean()

    fit(model, batch_of, loss_of, steps=steps, peak=0.05, folder=folder, recipe="a line", save_every=10)
    return model.weight.detach()


def test_a_training_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    whole = trained(tmp_path / "whole", 60)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", 60, stop=37)
    assert torch.equal(trained(tmp_path / "killed", 60), whole)
    assert (whole - 1).abs().max() < 0.2  # it learned the line


def test_a_state_of_another_recipe_is_refused(tmp_path):
    trained(tmp_path, 20)
    with pytest.raises(SystemExit, match="another recipe"):
        fit(torch.nn.Linear(3, 1), lambda step: (), lambda: None, steps=1, peak=0.1, folder=tmp_path, recipe="else")
