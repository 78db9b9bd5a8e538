"""Settings: layers, types, recipes, and what is said to a typing error."""

import math
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from dataclasses import field as dataclass_field
from typing import ClassVar, Literal, get_origin, get_type_hints

import pytest
import torch

from sds3d.config import load as configs
from sds3d.config import recipes
from sds3d.config.load import Config, changed, load, of_run, parse_overrides, to_yaml
from sds3d.config.recipes import recipes_folder
from sds3d.config.typed import build, keys, merge, nearest, plain
from sds3d.distill.score import METHODS
from sds3d.distill.weights import WEIGHTS
from sds3d.export.settings import MeshConfig
from sds3d.prompts import COLOURS
from sds3d.runs.build import build_student, build_teacher
from sds3d.runtime.device import pick_device
from sds3d.runtime.ramp import Ramp
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.regularisers import RegulariserConfig
from sds3d.students.scene.turns import DomainConfig
from sds3d.teachers.training.settings import FitConfig


def test_layers_lie_over_one_another_in_the_order_that_is_promised(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\nsteps: 50\nrender: {views: 2, resolution: 32}\n")
    config = load("a ball", {"seed": 6, "render.views": 3}, parse_overrides(["seed=7"]), file=file)
    assert (config.seed, config.steps, config.render.views, config.render.resolution) == (7, 50, 3, 32)
    assert config.render.samples == Config("x").render.samples  # untouched
    assert load("a ball", {"render": {"views": 9}}, file=file).render.resolution == 32


def test_the_recipe_is_under_what_the_user_says_and_over_the_defaults():
    raw = recipes.recipe("sds")
    assert raw["method"]["name"] == "sds"
    config = load("a ball")
    assert config.method == METHODS["sds"](**{**plain(METHODS["sds"]()), **config_fields(raw)})
    assert load("a ball", parse_overrides(["method.scale=11"])).method.scale == Ramp.constant(11)
    assert load("a ball", {"method": "sds"}) == config


def config_fields(raw):
    return {k: Ramp.parse(v) for k, v in raw["method"].items() if k != "name"}


@pytest.mark.parametrize("folder", [recipes_folder(), recipes.PIPELINES], ids=["packaged", "pipelines"])
def test_no_recipe_of_a_method_repeats_what_all_have_in_common(folder):
    def leaves(values, above=""):
        for key, value in values.items():
            yield from leaves(value, f"{above}{key}.") if isinstance(value, dict) else [(above + key, str(value))]

    common = set(leaves(recipes.read_yaml(folder / "scene.yaml")))
    paths = [path for path in folder.glob("*.yaml") if path.stem in METHODS]
    assert len(paths) >= 3
    for path in paths:
        repeated = common & set(leaves(recipes.read_yaml(path)))
        assert not repeated, f"{path}: {sorted(repeated)}"


@pytest.mark.parametrize(
    "path", sorted(set(recipes_folder().glob("*.yaml")) - {recipes_folder() / "scene.yaml"}), ids=lambda p: p.stem
)
def test_every_recipe_loads_is_short_and_says_something(path):
    assert len(path.read_text().splitlines()) <= 30
    assert recipes.recipe(path.stem)
    config = load("a ball", {"method": path.stem})
    assert METHODS[path.stem] is type(config.method)


PUBLISHED = {  # method or model -> method's scale, last pixels, W, largest t at first and at last, sparsity
    "sds": (100, 512, "sigma2", 0.98, 0.5, 1.0),
    "nfsd": (7.5, 512, "sigma2", 0.98, 0.5, 1.0),
    "vsd": (7.5, 512, "sigma2", 0.98, 0.5, 10.0),
    "if": (20, 64, "sigma2", 0.98, 0.98, 1.0),
    "sd3": (100, 512, "flow", 0.98, 0.98, 0.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_diffusers_pipeline_has_recipes_of_its_own(name):
    path = recipes.PIPELINES / f"{name}.yaml"
    assert len(path.read_text().splitlines()) <= 30 and "not yet measured" in " ".join(path.read_text().split("\n# "))
    given = {"method": name, "teacher.name": "somebody/model"} if name in METHODS else {}
    config = load("a corgi", given, file=None if given else name)
    found = Ramp.parse(config.method.scale), config.render.resolution_at(math.inf), config.weight
    times = config.time.t_max(0), config.time.t_max(config.steps), config.regularise.lambda_sparsity(0)
    assert (*found, *times) == (Ramp.parse(PUBLISHED[name][0]), *PUBLISHED[name][1:])
    assert config.field.finest == 2048 and config.optim.lr["grid"] == Ramp.constant(1e-2)
    toys = load("a corgi", {"method": config_name(config)})
    assert toys.field.finest == 128 and toys.weight == "x0"  # the packaged teacher keeps its own


def config_name(config):
    return configs.name_of(config.method)


def test_a_recipe_of_a_single_model_lies_under_what_the_user_says(in_folder):
    config = load("a corgi", {"teacher.name": "mine/sd3", "steps": 100}, file="sd3")
    assert (config.teacher.name, config.steps, config.render.resolution) == ("mine/sd3", 100, ((0, 256), (33, 512)))
    assert load("a corgi", {"method": "csd", "teacher.name": "a/b"}).time == load("a", {"teacher.name": "a/b"}).time
    (in_folder / "small").mkdir()
    (in_folder / "small/model_index.json").write_text("{}")
    assert load("a corgi", {"teacher.name": "small"}) == load("a corgi")  # a folder of that name is not the teacher
    (in_folder / "sd3").write_text("steps: 7\n")
    assert load("a corgi", file="sd3").steps == 7  # a file of the name comes first
    with pytest.raises(ValueError, match="cannot read sd4: "):
        load("a corgi", file="sd4")
    assert load("a corgi", {"teacher.name": "a/b"}, kind=configs.PaintConfig).steps == configs.PaintConfig("a").steps


def test_images_and_generators_take_of_a_single_models_recipe_what_is_not_about_scenes():
    painted = load("a corgi", file="sd3", kind=configs.PaintConfig)
    assert (painted.weight, painted.method.scale) == ("flow", Ramp.constant(100)) and painted.negative
    assert painted.steps == configs.PaintConfig("a corgi").steps
    learnt = load(None, {"method": "vsd"}, file="sd3", kind=configs.DistillConfig)
    assert learnt.teacher.name == painted.teacher.name and learnt.steps == configs.DistillConfig().steps


@pytest.mark.parametrize("method", ["sds", "vsd", "nfsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_stages_of_resolution_fit_into_few_steps(method, steps):
    """Whose parts fall on one step: the last of them counts."""
    config = load("a corgi", {"method": method, "teacher.name": "a/b", "steps": steps})
    assert config.render.resolution_at(steps) == 512


def test_ramps_of_a_recipe_follow_the_number_of_steps(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: {grid: ['${part:0.5}', 1e-2, 1e-3, '${steps}']}}\nlog: {save_every: '${part:1}'}\n")
    for steps in (100, 301):
        config = load("a ball", {"steps": steps}, file=file)
        assert config.optim.lr["grid"] == Ramp(round(steps / 2), 1e-2, 1e-3, steps)
        assert config.optim.lr["mlp"] == load("a ball", {"steps": steps}).optim.lr["mlp"]  # the others stay
        assert config.log.save_every == steps


@pytest.mark.parametrize("prompt", ["a red mug", "3", "true", "null", "a ${steps} \"quoted\" 'mug': #1", "été"])
def test_a_written_config_reads_back_as_itself(tmp_path, prompt):
    ours = ["optim.clip.grid=0.5", "camera.fov=[30,50]", "time.t_min=0.1", "time.t_max=[0,0.9,0.5,10]"]
    config = load(prompt, parse_overrides(ours))
    assert config.prompt == prompt
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(None, file=file) == config


TEXTS = [
    "[deformed], blurry",
    "blurry #1 ugly",
    "style: ugly",
    "no",
    "null",
    "0x10",
    "1:30",
    "{a: b}",
    "a=b",
    "'quoted'",
    " two  spaces ",
    "",
    "${steps} and ${oc.env:HOME}",
    "\\${steps}",
    "\\\\${steps}\\",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_setting_that_is_text_is_taken_as_it_is_written(tmp_path, text):
    """And is written so that it reads back as itself."""
    names = ("negative", "source.prompt", "source.run", "out", "teacher.hf.variant", "prompt")
    config = load(None, parse_overrides(f"{name}={text or (name == 'prompt') * 'x'}" for name in names))
    assert (config.negative, config.source.prompt, config.source.run, config.out) == (text,) * 4
    assert (config.teacher.hf.variant, config.prompt) == (text, text or "x")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(None, file=tmp_path / "config.yaml") == config
    painted = load("a ball", parse_overrides([f"image.start={text}"]), kind=configs.PaintConfig)
    assert painted.image.start == text


def test_the_settings_that_are_text_are_those_of_every_kind_of_run():
    assert {"prompt", "image.start", "generator.prompts", "pairs.folder", "real", "backend"} <= configs.text_keys()
    assert not {"method", "steps", "teacher", "critic.targets", "optim.lr"} & configs.text_keys()


MISTAKES = {
    "render.resolutoin=3": "unknown key 'render.resolutoin'; did you mean render.resolution",
    "resolution=3": "unknown key 'resolution'; did you mean occupancy.resolution or render.resolution",
    "render.res=3": "unknown key 'render.res'; did you mean render.resolution?",
    "stepps=3": "unknown key 'stepps'; did you mean steps?",
    "method.scal=3": "unknown key 'method.scal'; did you mean method.scale",
    "method=sdss": "method is 'sdss'; did you mean sds?",
    "optim.lr.grid=[1,2]": "optim.lr.grid: give a number, or a ramp",
    "steps=abc": "steps is 'abc'; give a whole number",
    "steps=1.5": "steps is 1.5; give a whole number",
    "steps=true": "steps is True; give a whole number",
    "steps=0": "steps is 0; give 1 or more",
    "steps=null": "steps is None; give a whole number",
    "uncond_camera=1": "uncond_camera is 1; give true or false",
    "seed=-1": "seed is -1; give 0 to",
    "render.resolution=0": "render.resolution is 0; give a number from 4",
    "render.resolution=[[0,64],[0,128]]": "with growing steps from 0 on",
    "render.resolution=[[5,64]]": "with growing steps from 0 on",
    "render.resolution=[]": "with growing steps from 0 on",
    "render.resolution=[[0,64],[9,2000]]": "render.resolution is 2000; give a number from 4",
    "render.resolution=big": "render.resolution is 'big'; give a whole number",
    "render.views=-2": "render.views is -2; give 1 to 256",
    "export.mesh.resolution=100000": "export.mesh.resolution is 100000; give 8 to 512",
    "export.size=33": "export.size is 33; give an even number",
    "export.frames=1": "export.frames is 1; give 2",
    "camera.fov=[1,2,3]": r"camera.fov is \[1, 2, 3\]; give 2 values",
    "camera.fov=40": r"camera.fov is 40; give a list, as in camera.fov=\[1,2\]",
    "camera.elevation=[50,20]": "camera.elevation is .* low <= high",
    "time.t_max=2": "t_max goes from 2.0 to 2.0; t lies in",
    "field=3": "field is 3; give its parts, as in field.levels=",
    "teacher.views=both": "teacher.views is 'both'; give camera or words",
    "backend=nmba": "backend is 'nmba'; did you mean numba",
    "seed=${nothing}": "cannot resolve the settings",
    "red": "'red' is no key=value; write settings as steps=800, and the prompt in quotes",
    "=3": "is no key=value",
    "steps =3": "is no key=value",
    "a=[": r"cannot read 'a=\['",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_answered_with_what_is_accepted(text):
    with pytest.raises(ValueError, match=MISTAKES[text]) as caught:
        load("a ball", parse_overrides([text]))
    assert "\n" not in str(caught.value)


def test_a_setting_answers_to_the_name_it_had_and_says_the_new_one():
    with pytest.warns(UserWarning, match="export.mesh_resolution is now called export.mesh.resolution"):
        config = load("a ball", parse_overrides(["export.mesh_resolution=24", "export.size=32"]))
    assert (config.export.mesh.resolution, config.export.size) == (24, 32)
    with pytest.warns(UserWarning, match="export.threshold is now called export.mesh.level"):
        assert changed(config, {"export": {"threshold": 7.0}}).export.mesh == MeshConfig(24, 7.0)
    for both in ({"export.keep": 0.1, "export.mesh.keep": 0.2}, {"export.keep": 0.1, "export.mesh": {"keep": None}}):
        with pytest.raises(ValueError, match="export.mesh.keep is given twice, once as export.keep, its old name"):
            load("a ball", both)
    for nothing in (3, None, "abc", [1]):
        with pytest.raises(ValueError, match="export.mesh is .*; give its parts, as in export.mesh.faces="):
            load("a ball", {"export.mesh": nothing, "export.faces": 700})
    with pytest.warns(UserWarning, match="export.keep, export.faces are now called") as warned:
        load("a ball", {"export": {"faces": 700, "keep": 0.1}})
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.filterwarnings("error")
def test_a_run_from_before_a_setting_was_renamed_opens_without_a_word(tmp_path):
    old = "prompt: a ball\nexport: {mesh_resolution: 24, threshold: null, faces: 700, size: 32}\n"
    (tmp_path / "config.yaml").write_text(old)
    export = of_run(tmp_path / "config.yaml").export
    assert export.mesh == MeshConfig(resolution=24, faces=700) and export.size == 32


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(prompt):
    with pytest.raises(ValueError, match="the prompt is empty; say what to make, as in"):
        load(prompt)


def test_a_file_that_is_no_config(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.yaml: No such file"):
        load("a ball", file=tmp_path / "none.yaml")
    for text, message in {"a: [": "is no YAML", "- 1\n- 2\n": "holds no settings", "\x00": "is no YAML"}.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load("a ball", file=tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="there is no prompt"):
        load(None)


def test_devices_and_teachers_that_are_not_here(tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' is not usable here; give auto, cpu"):
        pick_device("gpu")
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is not usable here"):
            pick_device("cuda")
    with pytest.raises(ValueError, match="teacher 'smal' is neither packaged .small, toybox, surface, digits., a file"):
        build_teacher(load("a ball", {"teacher.name": "smal"}))


def test_a_file_of_weights_is_found_again_from_any_folder(in_folder):
    (in_folder / "small").write_text("")  # a packaged teacher of that name comes first
    (in_folder / "mine.safetensors").write_text("")
    assert load("a ball", {"teacher.name": "mine.safetensors"}).teacher.name == str(in_folder / "mine.safetensors")
    assert load("a ball", {"teacher.name": "small"}).teacher.name == "small"


def test_the_weight_names_of_noise_are_accepted():
    for name in WEIGHTS:
        assert load("a ball", {"weight": name}).weight == name


def test_what_may_change_on_resume():
    config = load("a ball", {"seed": 4, "optim.lr.grid": 0.5})
    longer = configs.changed(config, parse_overrides(["steps=900", "log.save_every=7"]))
    assert (longer.steps, longer.log.save_every, longer.log.picture_every) == (900, 7, config.log.picture_every)
    assert longer.optim == config.optim
    with pytest.raises(ValueError, match="seed cannot change on resume, only steps, device"):
        configs.changed(config, {"seed": 5})
    with pytest.raises(ValueError, match="unknown key 'log.every'"):
        configs.changed(config, {"log.every": 5})
    sparing = configs.changed(config, parse_overrides(["teacher.hf.slicing=true", "render.chunk=4096"]))
    assert sparing.teacher.hf.slicing and sparing.render.chunk == 4096 and sparing.teacher.name == config.teacher.name
    for other in ({"teacher.hf.size": 64}, {"teacher.hf.slicing": True, "teacher.dtype": "float32"}, {"render": 5}):
        with pytest.raises(ValueError, match="cannot change on resume"):
            configs.changed(config, other)


def test_prompts_of_a_scene_name_unusual_backgrounds():
    student = build_student(load("a ball", {"render.resolution": 8, "backend": "torch"}))
    cameras = student.config.camera.sample(2, torch.Generator().manual_seed(0))
    assert student.prompts(cameras, "white") == ["a ball"] * 2
    assert student.prompts(cameras, "grey") == ["a ball on a grey background"] * 2
    assert student.prompts(cameras, "#102030") == ["a ball"] * 2


def test_another_kind_of_field_than_the_recipe_s_needs_no_other_setting():
    usual, density = load("a red mug"), load("a red mug", {"field.kind": "density"})
    assert (usual.field.kind, density.field.kind) == ("sdf", "density")
    assert usual.regularise.lambda_eikonal.v0 > 0 == density.regularise.lambda_eikonal.v0
    assert density.field == FieldConfig() and density.domains == usual.domains
    with pytest.raises(ValueError, match="field.width is for field.kind=sdf"):
        load("a red mug", {"field": {"kind": "density", "width": 0.05}})


def test_the_recipe_s_range_of_t_on_surfaces_is_in_its_own_unit():
    assert load("a red mug").domains.t_max == Ramp.constant(1.0)
    ratio = load("a red mug", {"time": {"unit": "ratio", "t_min": 0.5, "t_max": 20}})
    assert ratio.domains.t_min is ratio.domains.t_max is None and ratio.domains.normals.v0 > 0


def test_a_stored_config_that_lacks_settings_gets_the_defaults_and_not_the_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text("prompt: a red mug\nsteps: 30\nmethod: {name: sds}\n")
    old = of_run(tmp_path / "config.yaml")
    assert old.field == FieldConfig() and old.domains == DomainConfig() and old.regularise == RegulariserConfig()


def test_a_background_in_the_prompt_is_the_scene_s():
    student = build_student(load("a red ball on a black background", {"render.resolution": 8, "backend": "torch"}))
    draw = student.draw(1, torch.Generator().manual_seed(0))  # step 0 shows normals
    assert draw.prompts == ["a red ball on a black background"] * 4
    corner = draw.images[0, :, 0, 0].tolist()
    assert corner == pytest.approx(COLOURS["black"], abs=0.02)
    recipe = {"teacher.name": "a/b", "render.resolution": 8, "field.log2_table": 8, "field.finest": 16, "device": "cpu"}
    by_pipeline = load("a red ball on a black background", recipe)
    assert by_pipeline.render.background == "learned"  # which the recipe says, and no user
    corner = build_student(by_pipeline).draw(0, torch.Generator().manual_seed(0)).images[0, :, 0, 0]
    assert corner.tolist() == pytest.approx(COLOURS["black"], abs=0.02)
    with pytest.raises(ValueError, match="names a black background and render.background is grey"):
        build_student(load("a red ball on a black background", {"render.background": "grey"}))


def test_view_words_in_the_middle_of_a_prompt_name_no_view():
    with pytest.raises(ValueError, match="does not know 'mirrors'"):  # not that it names a view
        build_teacher(load("a car with side view mirrors"))


def test_a_scene_s_prompt_says_no_view():
    with pytest.raises(ValueError, match="says 'side view', but a scene is seen from all sides"):
        build_teacher(load("a red mug, side view"))
    with pytest.raises(ValueError, match="negative: .*'uglyy' \\(nearest: ugly"):
        build_teacher(load("a red mug", {"negative": "uglyy"}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", -5, "steps is -5"),
        ("occupancy.grow", -1, "occupancy.grow is -1"),
        ("occupancy.decay", 5, "occupancy.decay is 5"),
        ("export.elevation", 500, "export.elevation is 500"),
        ("field.density_gain", math.nan, "field.density_gain is nan"),
        ("field.blob_strength", math.nan, "field.blob_strength is nan"),
        ("optim.lr.grid", True, "optim.lr.grid: give a number"),
    ],
)
def test_values_nobody_can_use_are_refused(key, value, said):
    with pytest.raises(ValueError, match=said):
        load("a ball", {key: value})
    assert load("a ball", {"method": None}).method == load("a ball").method


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    share: float | None = None
    ramp: Ramp | float = 1.0
    rates: dict[str, Ramp] = dataclass_field(default_factory=dict)
    inner: Inner = Inner()


def test_typed_values():
    values = {"name": 3, "share": 1, "ramp": [0, 1, 2, 9], "rates": {"a": 2, "b": None}, "inner": {"pair": [3]}}
    built = build(Outer, values)
    assert built == Outer("3", 1.0, Ramp(0, 1, 2, 9), {"a": Ramp.constant(2)}, Inner((3,)))
    assert isinstance(built.share, float)
    assert build(Outer, plain(built)) == built
    assert build(Outer, {"share": None}).share is None
    with pytest.raises(ValueError, match="inner.kind is 'c'; there is a, b"):
        build(Outer, {"inner": {"kind": "c"}})
    with pytest.raises(ValueError, match=r"inner.pair\[1\] is 'y'; give a whole number"):
        build(Outer, {"inner": {"pair": [1, "y"]}})


def test_merge_replaces_values_and_joins_mappings():
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(below, {"a": {"y": [3]}, "b": {"c": 2}}) == {"a": {"x": 1, "y": [3]}, "b": {"c": 2}}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_nearest():
    assert nearest("b.lon", ["a.lon", "b.long", "c"]) == "did you mean a.lon or b.long?"
    assert nearest("zzz", ["one", "two.three"]) == "there is one"


def test_every_setting_is_a_plain_value_and_has_a_key():
    def leaves(value, path=""):
        for f in fields(value):
            inner = getattr(value, f.name)
            key = f"{path}{f.name}"
            yield from leaves(inner, key + ".") if is_dataclass(inner) and not isinstance(inner, Ramp) else [key]

    config = load("a ball")
    known = {*keys(Config), *keys(type(config.method), "method")}
    assert set(leaves(config)) <= known


def test_settings_of_a_method_join_its_name_whatever_the_order():
    for layers in (
        ({"method": "nfsd"}, {"method.scale": 3.0}),
        ({"method.scale": 3.0}, {"method": "nfsd"}),
        ({"method": "nfsd", "method.scale": 3.0},),
        ({"method": {"name": "nfsd", "scale": 3.0}},),
    ):
        method = load("a mug", *layers).method
        assert type(method).__name__ == "NFSD" and Ramp.parse(method.scale)(0) == 3.0, layers


def test_another_method_takes_none_of_the_settings_of_the_one_below(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(load("a mug", {"method": "vsd", "method.particles": 3})))
    assert load(None, file=file).method.particles == 3
    assert type(load(None, {"method": "nfsd"}, file=file).method).__name__ == "NFSD"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"method": "nsfd"}, "did you mean nfsd"),
        ({"method": "nfsd", "method.scal": 2}, "did you mean method.scale"),
        ({"method": "vsd", "method.particles": 65}, "method.particles is 65; give 1 to 64"),
        ({"method": "vsd", "critic.kind": "lara"}, "did you mean lora"),
        ({"noise": "old"}, "noise is 'old'; give fresh or fixed"),
        ({"guidance.rescale": 2}, "guidance.rescale is 2.*0 to 1"),
        ({"guidance.rescale": 0.7, "guidance.rescale_on": "eps"}, "rescale_on is 'eps'; give x0 or output"),
        ({"guidance.rescale_on": "output"}, "give guidance.rescale, as in 0.7"),
        ({"time.kind": "normal"}, "time.kind.*uniform, lognormal or dreamtime"),
        ({"weight": "sigma"}, "unknown weight 'sigma'"),
    ],
)
def test_mistakes_about_methods_are_answered_before_anything_runs(overrides, said):
    from sds3d.runs import launch

    with pytest.raises(ValueError, match=said):
        launch.check(load("a red mug", overrides))


KINDS = (Config, configs.PaintConfig, configs.DistillConfig)


def numbers_of(cls, path=""):
    """(dotted key, its type without range, its ranges) of every setting of a dataclass that holds numbers."""
    for name, kind in get_type_hints(cls, include_extras=True).items():
        key = f"{path}.{name}" if path else name
        if is_dataclass(kind):
            yield from numbers_of(kind, key)
        elif get_origin(kind) is not ClassVar and {"int", "float", "Ramp"} & set(re.findall(r"\w+", str(kind))):
            yield key, str(kind)


NUMBERS = sorted(
    {(kind, key, hint, "") for kind in KINDS for key, hint in numbers_of(kind)}
    | {(configs.DistillConfig if {"pairs", "real"} & set(method.NEEDS) else Config, key, hint, name)
       for name, method in METHODS.items() for key, hint in numbers_of(method, "method")}
    | {(FitConfig, key, hint, "") for key, hint in numbers_of(FitConfig)},
    key=str,
)  # fmt: skip


def made_with(kind, key, value, method):
    """A config, or a method's settings, with one value that is not the default."""
    cls, path = (METHODS[method], "method") if method else (kind, "")
    node = value
    for name in reversed(key.removeprefix("method.").split(".") if key else []):
        node = {name: node}
    defaults = plain(cls("a ball") if cls in KINDS else cls())
    defaults.pop("method", None)
    return build(cls, merge(defaults, node or {}), path)


def test_there_are_numbers_to_refuse():
    assert len(NUMBERS) > 150 and ("seed" in {key for _, key, _, _ in NUMBERS})


@pytest.mark.parametrize(("kind", "key", "hint", "method"), NUMBERS, ids=lambda value: getattr(value, "__name__", None))
def test_every_number_has_a_range_that_holds_its_default(kind, key, hint, method):
    """And refuses by name what means nothing: nan, endless, 1e30, and, where its type is whole, 10^30."""
    assert "Within" in hint or key == "render.resolution", f"{key} has no range: {hint}"
    named = "dict" in hint
    pair = "tuple" in hint and key != "render.resolution"
    for bad in (math.nan, math.inf, -math.inf, 1e30, -1e30, 10**30, -(10**30)):
        for value in [[bad, bad], [bad]] if pair else [{"grid": bad}] if named else [bad]:
            with pytest.raises(ValueError, match=re.escape(key)) as caught:
                made_with(kind, key, value, method)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    made_with(kind, "", None, method)


@pytest.mark.parametrize(
    ("key", "value"),
    [("time.mean", math.nan), ("critic.weight_decay", -math.inf), ("optim.eps", math.inf), ("steps", 10**30),
     ("field.blob_strength", 1e308), ("regularise.lambda_sparsity", -1.0), ("field.hidden", 10**9)],
)  # fmt: skip
def test_a_config_that_python_makes_is_held_to_the_same_ranges(key, value):
    section, _, name = key.rpartition(".")
    config = Config("a ball")
    with pytest.raises(ValueError, match=re.escape(key)):
        if section:
            value = Ramp.constant(value) if "lambda" in name else value
            replace(config, **{section: replace(getattr(config, section), **{name: value})})
        else:
            replace(config, **{name: value})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["field.levels=64", "field.log2_table=24", "field.finest=65536"], "the hash grid of field would have"),
        (["render.views=256", "render.resolution=1024"], "render.views=256 of 1024 pixels"),
        (["render.resolution=[[0,64],[100000000000,128]]"], "stage from step 100000000000"),
    ],
)
def test_sizes_that_are_each_in_range_are_refused_where_they_multiply(texts, said):
    with pytest.raises(ValueError, match=said):
        load("a ball", parse_overrides(texts))


def test_a_programs_omegaconf_config_is_a_layer():
    from omegaconf import OmegaConf

    layer = OmegaConf.create({"steps": 100, "optim": {"lr": {"grid": [0, 0.01, 0.001, "${steps}"]}}})
    config = load("a red mug", layer)
    assert (config.steps, config.optim.lr["grid"].end) == (100, 100)
