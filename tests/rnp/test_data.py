"""The demo's scenes: no leak between the splits, the same twice, harder where the difficulty says so."""

from __future__ import annotations

import pytest
import torch

from rnp import data

TRAIN, TEST = data.digit_sources(seed=3)


def test_every_source_digit_is_in_exactly_one_split() -> None:
    train, test = set(TRAIN.index.tolist()), set(TEST.index.tolist())
    assert not train & test
    assert train | test == set(range(1797))


def test_no_image_occurs_in_both_splits() -> None:
    train = {image.numpy().tobytes() for image in TRAIN.images}
    assert not any(image.numpy().tobytes() in train for image in TEST.images)


def test_the_split_keeps_the_classes_and_the_labels() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for part, share in ((TRAIN, 0.7), (TEST, 0.3)):
        counts = torch.bincount(part.labels, minlength=10)
        whole = torch.bincount(torch.tensor(digits.target), minlength=10)
        assert torch.all((counts - share * whole).abs() <= 0.5 + 1e-9)
        assert torch.equal(part.labels, torch.tensor(digits.target)[part.index])
        assert torch.equal(part.images, torch.tensor(digits.images[part.index.numpy()], dtype=torch.float32) / 16)


def test_a_scene_is_made_of_the_digits_of_its_split_alone() -> None:
    """With one class of source digits per split, no scene can show another class."""

    def only(sources: data.Sources, digits: tuple[int, ...]) -> data.Sources:
        keep = torch.isin(sources.labels, torch.tensor(digits))
        return data.Sources(sources.images[keep], sources.labels[keep], sources.index[keep])

    scenes = data.compose(only(TRAIN, (2, 7)), 200, seed=0)
    assert set(scenes.labels.tolist()) == {22, 27, 72, 77}


def test_an_easy_scene_shows_its_digits_left_and_right() -> None:
    """Ink of a black source digit appears on its side only: the label's tens are the left digit."""
    blank = torch.zeros(2, 8, 8)
    blank[1, 1:7, 1:7] = 1
    sources = data.Sources(blank, torch.tensor([0, 1]), torch.tensor([0, 1]))
    scenes = data.compose(sources, 400, seed=1, hard_share=0.0)
    ink = scenes.images[:, 0].float().unflatten(2, (2, 16)).mean((1, 3))  # (N, left and right)
    digits = torch.stack([scenes.labels // 10, scenes.labels % 10], 1)
    few = scenes.difficulty < 0.1  # no fragments yet
    assert few.sum() > 50
    assert torch.equal(ink[few] > 20, digits[few] == 1)


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others() -> None:
    first, again, other = (data.compose(TRAIN, 150, seed) for seed in (5, 5, 6))
    for name in ("images", "labels", "difficulty"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, other.images)


def test_scenes_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = data.compose(TRAIN, 120, seed=7)
        torch.set_num_threads(2)
        two = data.compose(TRAIN, 120, seed=7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.images, two.images)


def test_difficulty_is_bimodal_in_the_share_asked_for() -> None:
    difficulty = data.compose(TRAIN, 4000, seed=8, hard_share=0.3).difficulty
    easy = (difficulty >= data.EASY[0]) & (difficulty <= data.EASY[1])
    hard = (difficulty >= data.HARD[0]) & (difficulty <= data.HARD[1])
    assert torch.all(easy | hard)
    assert abs(hard.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_every_component_grows_with_difficulty() -> None:
    strengths = data.strengths(torch.linspace(0, 1, 1001))
    for name, values in strengths.items():
        assert torch.all(values.diff() >= 0), name
        assert values[-1] > values[0] >= 0, name
    for name in ("fade", "shrink", "fragment", "lines", "inversion"):
        assert strengths[name][-1] <= 1, name


def test_easy_scenes_are_neither_inverted_nor_crossed_by_lines() -> None:
    strengths = data.strengths(torch.linspace(*data.EASY, 100))
    assert float(strengths["lines"].max()) == 0 and float(strengths["inversion"].max()) == 0
    easy = data.compose(TRAIN, 500, seed=9, hard_share=0.0).images.float().mean((1, 2, 3)) / 255
    hard = data.compose(TRAIN, 500, seed=9, hard_share=1.0).images.float().mean((1, 2, 3)) / 255
    assert float(easy.max()) < 0.5  # dark ground
    assert 0.5 < float((hard > 0.5).double().mean()) < 0.7  # 0.6 of them are light


def test_a_batch_is_float_in_0_to_1_and_the_loader_covers_everything_once() -> None:
    scenes = data.compose(TRAIN, 107, seed=10)
    loader = data.SceneLoader(scenes, 25)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [25, 25, 25, 25, 7] and len(loader) == 5
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32 and images.shape == (107, 1, 32, 32)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal((images * 255).round().to(torch.uint8), scenes.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), scenes.labels)


def test_a_shuffled_loader_follows_torchs_generator_and_never_repeats_an_image() -> None:
    scenes = data.compose(TRAIN, 60, seed=11)
    numbered = data.Scenes(scenes.images, torch.arange(60), scenes.difficulty)
    loader = data.SceneLoader(numbered, 25, shuffle=True)
    torch.manual_seed(1)
    first = torch.cat([labels for _, labels in loader])
    second = torch.cat([labels for _, labels in loader])
    torch.manual_seed(1)
    again = torch.cat([labels for _, labels in loader])
    assert len(first) == 50 and len(first.unique()) == 50
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.digit_sources(test_share=1.0), "test_share must lie inside 0…1, got 1.0"),
        (lambda: data.compose(TRAIN, 0, seed=0), "count must be at least 1"),
        (lambda: data.compose(TRAIN, 5, seed=0, size=8), "size at least 16, got 5 and 8"),
        (lambda: data.compose(TRAIN, 5, seed=0, hard_share=1.5), "hard_share must lie in 0…1, got 1.5"),
        (lambda: data.SceneLoader(data.compose(TRAIN, 5, seed=0), 0), "batch_size must be 1…5, got 0"),
        (lambda: data.SceneLoader(data.compose(TRAIN, 5, seed=0), 6, shuffle=True), "batch_size must be 1…5, got 6"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()
