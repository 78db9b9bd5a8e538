"""The embedded teacher and its training."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch

from sds3d.cameras import cat, orbit
from sds3d.data import renders, toybox, tracing
from sds3d.data.toybox import VOCABULARY
from sds3d.networks.ema import EMA
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig, ray_features
from sds3d.teachers import small
from sds3d.teachers.drawing import sample
from sds3d.teachers.training import fit, sources
from sds3d.teachers.training.settings import FitConfig


@pytest.fixture(scope="module")
def teacher():
    return small.load()


def ask(teacher, prompts, cameras=None, mask=None, seed=0):
    x = torch.randn((len(prompts), 3, 64, 64), generator=torch.Generator().manual_seed(seed))
    return teacher.predict(x, torch.full((len(prompts),), 0.8), prompts, cameras, mask)


def test_the_packaged_weights_are_small_and_know_the_toybox(teacher):
    assert small.packaged("small").stat().st_size < 16e6
    assert set(VOCABULARY) <= set(teacher.vocabulary)
    count = sum(p.numel() for m in (teacher.unet, teacher.text) for p in m.parameters())
    assert 4e6 <= count <= 8e6


@pytest.mark.slow
def test_it_denoises_what_it_was_asked_for(teacher):
    """From pure noise, a red ball is red in the middle and white in the corners; a blue one is blue."""
    for prompt, channel in (("a red cube", 0), ("a blue cone", 2)):
        image = sample(teacher, [prompt], cameras=orbit(1), steps=8)[0]
        middle = image[:, 28:36, 28:36].mean((1, 2))
        assert middle.argmax() == channel and middle[channel] - middle.min() > 0.2, (prompt, middle)
        assert image[:, :6, :6].mean() > 0.85


def test_a_compiled_teacher_answers_the_same(teacher, monkeypatch):
    """In fresh memory each time: a CUDA graph writes every answer to the same place."""
    modes, place = [], torch.empty(1, 3, 64, 64)

    def compiled(network, mode):
        modes.append(mode)
        return lambda *arguments: place.copy_(network(*arguments))

    monkeypatch.setattr(torch, "compile", compiled)
    replayed = small.load(compiled=True)
    first, second = (ask(replayed, [prompt]).v for prompt in ("a red mug", "a blue chair"))
    assert torch.equal(first, ask(teacher, ["a red mug"]).v) and torch.equal(second, ask(teacher, ["a blue chair"]).v)
    assert modes == ["reduce-overhead"]


@pytest.mark.slow
def test_torch_compile_answers_the_same(teacher):
    """The real compiler, on a CPU: no CUDA graph, but everything before it."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    replayed, prompts = small.load(compiled=True), ["a red mug", ""]
    for seed in range(2):  # the second answer is not to write into the first
        exact = ask(teacher, prompts, orbit(2), seed=seed)
        first = ask(replayed, prompts, orbit(2), seed=seed)
        ask(replayed, prompts, orbit(2), seed=9)
        assert torch.allclose(first.v, exact.v, rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_the_company(teacher):
    prompts = ["a red mug", "", "a green cube on a yellow cylinder"]
    cameras = orbit(3)
    mask = torch.tensor([True, False, True])
    order = torch.tensor([2, 0, 1])
    x = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.6, 0.9])
    straight = teacher.predict(x, t, prompts, cameras, mask).v
    turned = teacher.predict(x[order], t[order], [prompts[i] for i in order], cameras[order], mask[order]).v
    assert torch.allclose(straight[order], turned, atol=1e-4)


def test_a_dropped_camera_is_no_camera(teacher):
    prompts = ["a red mug, side view"] * 2
    dropped = ask(teacher, prompts, orbit(2), torch.zeros(2, dtype=torch.bool)).v
    assert torch.allclose(dropped, ask(teacher, prompts).v, atol=1e-5)
    assert not torch.allclose(dropped, ask(teacher, prompts, orbit(2)).v, atol=1e-2)


def front_and_back(teacher, prompt, views):
    """Four samples from the front and four from behind, told by the camera or in words."""
    found = []
    for word, camera in zip(("front", "back"), (orbit(2, elevation=0)[i] for i in (0, 1))):
        if views == "camera":
            found.append(sample(teacher, [prompt] * 4, cameras=cat([camera] * 4), steps=12, seed=1))
        else:
            found.append(sample(teacher, [f"{prompt}, {word} view"] * 4, steps=12, seed=1))
    return found


def truly_front_and_back(prompt):
    return [toybox.parse(prompt).render(orbit(2, elevation=0)[i])[0] for i in (0, 1)]


def lean(images):
    """How far right of the middle the dark or coloured pixels lie on average, pixels."""
    shown = (images.amin(1) < 0.7).float().sum((0, 1))  # (W,)
    return float((shown * (torch.arange(len(shown)) - 31.5)).sum() / shown.sum())


@pytest.mark.parametrize(
    "views",
    [
        "camera",
        pytest.param(
            "words",
            marks=pytest.mark.xfail(
                reason="told in words, the packaged teacher shows the handle in some samples only: in four, by chance",
                strict=False,
                raises=AssertionError,
            ),
        ),
    ],
)
def test_it_is_told_where_it_looks_from(teacher, views):
    """A mug's handle sticks out on one side in front and on the other behind."""
    true_front, true_back = map(lean, truly_front_and_back("a red mug"))
    assert true_front < -0.8 and true_back > 0.8
    front, back = map(lean, front_and_back(teacher, "a red mug", views))
    assert front < true_front / 2 and back > true_back / 2, (front, back)


def orange(images):
    """Pixels much redder than blue, an image."""
    return float((images[:, 0] - images[:, 2] > 0.25).sum()) / len(images)


@pytest.mark.slow
@pytest.mark.xfail(
    reason="the packaged teacher's nose is 1 to 3 orange pixels in front and 2 to 5 behind (step 25,400)",
    strict=True,
    raises=AssertionError,
)
@pytest.mark.parametrize("views", ["camera", "words"])
def test_a_snowman_has_a_nose_in_front_and_none_behind(teacher, views):
    front, back = map(orange, truly_front_and_back("a white snowman"))
    if not (front >= 6 and back == 0):
        raise RuntimeError("the toybox's own snowman has no nose that this test could see")
    front, back = map(orange, front_and_back(teacher, "a white snowman", views))
    assert front >= 3 and back <= front / 4, (front, back)


def test_unknown_words_name_their_neighbours(teacher):
    with pytest.raises(ValueError, match="'mugg' \\(nearest: mug"):
        teacher.check("a red mugg")
    with pytest.raises(ValueError, match="sds3d teacher words"):
        teacher.check("a photorealistic corgi")
    with pytest.raises(ValueError, match="has 19 words; the embedded teacher reads 18"):
        teacher.check("a red mug " + "a " * 16)
    with pytest.raises(ValueError, match="empty"):
        teacher.check("  , ")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red mug 红色 №7", ["'红'", "'色'", "'№'", "'7'"]),
        ("красная кружка", ["'красная'", "'кружка'"]),
        ("a (red:1.3) mug", ["'1.3'", "no weights, such as '(red:1.3)'"]),
        ("a red & blue mug", ["'&'"]),
        ("a red mug 🍕", ["'🍕'"]),
    ],
)
def test_text_that_a_closed_vocabulary_lacks_is_refused_by_name(teacher, prompt, unknown):
    with pytest.raises(ValueError, match="does not know") as caught:
        teacher.check(prompt)
    assert all(name in str(caught.value) for name in unknown), caught.value
    with pytest.raises(ValueError, match="the toybox does not know"):
        toybox.parse(prompt)


def test_brackets_are_said_to_weigh_nothing(teacher):
    with pytest.warns(UserWarning, match=r"'\(\(red\)\)' looks like a weighted word; weights are not applied"):
        teacher.check("a ((red)) mug")


@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_damaged_weights_are_refused(tmp_path, damage):
    path = tmp_path / "teacher.safetensors"
    if damage == "cut":
        path.write_bytes(small.packaged("small").read_bytes()[:100_000])
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, path, {"vocabulary": "[]"})
    with pytest.raises(ValueError, match="damaged|no teacher"):
        small.load(path)


def test_captions_become_tokens():
    text = TextEncoder(("a", "mug", "red"))
    assert text.tokens(["", "a red, Mug"]).tolist() == [[1, 0, 0, 0], [1, 2, 4, 3]]
    with pytest.raises(ValueError, match="at most 24"):
        text.tokens(["a " * 25])


def test_padding_changes_nothing():
    torch.manual_seed(0)
    text = TextEncoder(VOCABULARY).eval()
    alone, _, whole = text(text.tokens(["a red mug"]))
    padded, mask, whole2 = text(text.tokens(["a red mug", "a green cube on a yellow cylinder"]))
    assert mask[0].sum() == 4
    assert torch.allclose(alone[0], padded[0, :4], atol=1e-5) and torch.allclose(whole[0], whole2[0], atol=1e-5)


def test_ray_features_say_where_a_ray_passes():
    features = ray_features(orbit(4, elevation=30), 8)
    assert features.shape == (4, 18, 8, 8)
    direction, nearest = features[:, :3], features[:, 3:6]
    assert (direction * nearest).sum(1).abs().max() < 1e-5  # the nearest point is a right angle away
    assert nearest[:, :, 3:5, 3:5].norm(dim=1).max() < 0.25  # the middle of the image looks at the origin


def test_ema_follows_and_ends_near():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    ema = EMA(net, decay=0.9)
    with torch.no_grad():
        net.weight.fill_(3.0)
    for step in range(200):
        ema.update(net, step)
    assert torch.allclose(ema.module.weight, net.weight, atol=1e-4)


@pytest.mark.parametrize("quality", ["blur", "noise", "fade", "burn", "coarse", "darken"])
def test_degraded_images_stay_images(quality):
    image = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    spoilt = sources.degrade(image, quality, torch.Generator().manual_seed(1))
    assert spoilt.shape == image.shape and 0 <= spoilt.min() and spoilt.max() <= 1
    assert (spoilt - image).abs().mean() > 0.02


class SmallToys(sources.Toybox):
    """The toybox for a network that is trained in a moment."""

    network = UNetConfig(widths=(8, 8, 16, 16), blocks=(1, 1, 1), condition=16, heads=2)


@pytest.mark.slow
@pytest.mark.network
def test_training_learns_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "save_grid", lambda teacher, prompts, path: None)
    config = FitConfig(steps=6, batch=2, coarse=3, images=20, save_every=3)
    whole = list(fit.train(tmp_path / "whole", config, SmallToys()))
    stopped = fit.train(tmp_path / "parts", config, SmallToys())
    for row in stopped:
        if row.step == 4:  # between two saves
            break
    stopped.close()
    rest = list(fit.train(tmp_path / "parts", config, SmallToys(), resume=True))
    assert [r.step for r in rest] == [5, 6]
    assert (tmp_path / "parts" / "loss.png").is_file()
    a, b = (torch.load(tmp_path / k / "state.pt", weights_only=True) for k in ("whole", "parts"))
    assert torch.equal(a["losses"], b["losses"]) and whole[-1].total == 6
    assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])
    loaded = small.load(tmp_path / "whole" / "teacher.safetensors")
    assert isinstance(loaded.unet, UNet) and loaded.unet.config == SmallToys.network
    with pytest.raises(ValueError, match="--resume"):
        next(fit.train(tmp_path / "whole", config, SmallToys()))
    with pytest.raises(ValueError, match="no training"):
        next(fit.train(tmp_path / "new", config, SmallToys(), resume=True))
    assert fit.settings_of(tmp_path / "parts") == asdict(config)
    with pytest.raises(ValueError, match="has done 6 of 6 steps; give more"):
        next(fit.train(tmp_path / "parts", config, SmallToys(), resume=True))
    (tmp_path / "parts" / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="state.pt is damaged or of another version"):
        next(fit.train(tmp_path / "parts", config, SmallToys(), resume=True))


class TwoSquares:
    """A store of one render: a square in the main colour, a smaller one in the second."""

    names, sizes, cameras = ["mug"], [renders.SIZE_NAMES[0]], orbit(1)

    def __len__(self) -> int:
        return 1

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        layers = torch.zeros(len(index), tracing.LAYERS, 64, 64)
        layers[:, 0, 10:30, 10:30] = layers[:, 1, 40:50, 40:50] = 0.7
        layers[:, 5] = (layers[:, 0] + layers[:, 1]) > 0
        return layers


def test_a_batch_mixes_the_domains_and_their_words_outlast_the_null_caption():
    parts = sources.Toybox(colours=0.4).parts
    draw = sources.RenderBatches(TwoSquares(), torch.Generator().manual_seed(0), parts)
    batch, grey = draw(400), torch.zeros(3)
    words = [caption.rpartition(", ")[2] for caption in batch.captions]
    for domain, share in parts.items():
        of = torch.tensor([word == domain for word in words])
        if domain == "colours":
            assert "" in batch.captions  # the null caption of the ordinary images
            continue
        assert domain in batch.captions  # the null caption of this domain
        assert of.float().mean() == pytest.approx(share, abs=0.06)
        corner = batch.x[of][:, :, 0, 0]
        assert torch.equal(corner, (torch.ones(3) if domain == "albedo" else grey).expand_as(corner))
        assert batch.part is not None and bool(batch.part[of].any()) == (domain == "albedo")


def test_coarse_steps_weigh_the_second_colour_more():
    """Where it shows, and only there; a fine step weighs all pixels alike."""
    toybox_source = SmallToys()
    batch = sources.RenderBatches(TwoSquares(), torch.Generator().manual_seed(0), {"colours": 1.0})(2)
    assert batch.part.sum() == 2 * 10 * 10 and batch.part[:, :, 40:50, 40:50].all()
    losses = {}
    for part in (0.0, 3.0):
        for coarse in (0, 1):
            losses[part, coarse] = (
                fit.Fit(FitConfig(steps=2, part=part, coarse=coarse), toybox_source).loss(batch).item()
            )
    assert losses[0.0, 0] == losses[3.0, 0] and losses[3.0, 1] > losses[0.0, 1]
    nowhere = replace(batch, part=torch.zeros_like(batch.part))
    assert fit.Fit(FitConfig(steps=2, part=3.0, coarse=1), toybox_source).loss(nowhere).item() == losses[0.0, 1]


def test_a_teacher_of_colours_alone_learns_no_words_of_other_domains():
    alone, all_of_them = sources.Toybox(colours=1.0), sources.Toybox()
    assert alone.parts["colours"] == 1 and sum(alone.parts.values()) == 1
    assert set(all_of_them.vocabulary) - set(alone.vocabulary) == {"albedo", "normals", "depths"}
    assert sum(all_of_them.parts.values()) == pytest.approx(1)


def test_images_of_depths_weigh_more():
    depths, normals = (
        sources.RenderBatches(TwoSquares(), torch.Generator().manual_seed(0), {domain: 1.0})(2)
        for domain in ("depths", "normals")
    )
    assert depths.weight.tolist() == [sources.DEPTHS_WEIGHT] * 2 and normals.weight.tolist() == [1.0] * 2

    def loss(batch):
        return fit.Fit(FitConfig(steps=2, coarse=0), SmallToys()).loss(batch).item()

    assert loss(depths) == pytest.approx(sources.DEPTHS_WEIGHT * loss(replace(depths, weight=None)), rel=1e-5)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"decay": 0.0}, {"ema": 2.0}, {"lr": -1.0}, {"coarse": -3}])
def test_impossible_trainings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; give .* to "):
        FitConfig(**bad)


@pytest.mark.slow
def test_renders_are_made_again_where_the_shapes_or_the_seed_changed(tmp_path, monkeypatch):
    assert list(renders.build(tmp_path, 2)) == [2]
    stamp = (tmp_path / "rows.npy").stat().st_mtime_ns
    assert list(renders.build(tmp_path, 2)) == [2] and (tmp_path / "rows.npy").stat().st_mtime_ns == stamp
    monkeypatch.setattr(renders, "fingerprint", lambda: "other")
    list(renders.build(tmp_path, 2))
    assert (tmp_path / "rows.npy").stat().st_mtime_ns != stamp
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file"):
        next(renders.build(tmp_path / "file", 2))


class FewWords(SmallToys):
    """Toys with a vocabulary of three words."""

    def __init__(self):
        super().__init__()
        self.vocabulary = ("a", "mug", "red")


def test_a_training_can_begin_from_weights_that_know_fewer_words(tmp_path):
    before = fit.Fit(FitConfig(steps=2), FewWords())
    unet, text = before.nets["unet"], before.nets["text"]
    small.save(tmp_path / "before.safetensors", unet, text, FewWords().vocabulary)
    after = fit.Fit(FitConfig(steps=2, seed=1, start=str(tmp_path / "before.safetensors")), SmallToys())
    fresh = fit.Fit(FitConfig(steps=2, seed=1), SmallToys())

    def row(made: fit.Fit, word: str) -> torch.Tensor:
        encoder = made.nets["text"]
        return encoder.words.weight[encoder.index[word]]

    for word in FewWords().vocabulary:
        assert torch.allclose(row(after, word), row(before, word), atol=1e-3)  # the file holds half precision
    assert torch.equal(row(after, "normals"), row(fresh, "normals"))
    captions = ["a red mug", ""]
    for ours, theirs in zip(*(made.nets["text"](made.nets["text"].tokens(captions)) for made in (after, before))):
        assert torch.allclose(ours, theirs, atol=1e-2)
    weights = dict(before.nets["unet"].named_parameters())
    assert all(torch.allclose(w, weights[name], atol=1e-3) for name, w in after.nets["unet"].named_parameters())
    assert torch.equal(after.ema.module["text"].words.weight, after.nets["text"].words.weight)
    with pytest.raises(ValueError, match="network of another size"):
        fit.Fit(FitConfig(steps=2, start="digits"), SmallToys())


def test_a_teacher_keeps_images_of_the_sizes_that_it_was_trained_on(tmp_path):
    """Coarse steps come first and then every second time; without them there is one size only."""
    config = FitConfig(steps=9, coarse=4)
    assert [step for step in range(9) if config.is_coarse(step)] == [0, 1, 2, 3, 5, 7]
    assert not any(FitConfig(steps=9, coarse=0).is_coarse(step) for step in range(9))
    for coarse, sizes, kept in ((2, (32, 64), 32), (0, (64,), 64)):
        fit.Fit(FitConfig(steps=2, coarse=coarse), SmallToys()).save(tmp_path)
        teacher = small.load(tmp_path / small.FILE)
        assert teacher.sizes == sizes
        for side, encoded in ((32, kept), (64, 64), (48, 64), (128, 64)):
            images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
            x = teacher.encode(images)
            assert x.shape == (2, 3, encoded, encoded)
            assert encoded != side or torch.equal(x, 2 * images - 1)
