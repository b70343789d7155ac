"""The config: every key known, read and typed; every problem reported at once, with its remedy."""

import ast
import dataclasses
import enum
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import jax_sft
from jax_sft import config, settings
from jax_sft.data.sources import formats
from jax_sft.nn import remat_names
from jax_sft.ops.attention import dispatch
from jax_sft.runtime import command_line, config_help
from jax_sft.settings import Loss, Settings, Source
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import mesh_shape
from jax_sft.training import open_state
from jax_sft.validate import validate

PACKAGE = Path(config.__file__).parent


def problems(cfg, num_devices: int = 8) -> list[str]:
    """The numbered problems that validation finds, without their numbers."""
    try:
        validate(cfg, num_devices)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first == f"the config has {len(lines)} problem(s):"
        return [re.sub(r"^  \d+\. ", "", line) for line in lines]
    return []


def leaves(cfg: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted keys of a config that hold a value or a mapping of sources."""
    found = []
    for key in cfg:
        value = cfg[key]
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else []
        found += inner or [prefix + key]
    return found


# ---- keys --------------------------------------------------------------------------------------


def attributes_read() -> set[str]:
    """Names read as attributes anywhere in the package but where keys are made or only checked."""
    names = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name not in ("config.py", "settings.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


def test_every_key_is_read_somewhere():
    read = attributes_read()
    # `mesh_shape` reads these by name.
    assert set(config.default().mesh) == {*rules.AXES, "cpu_devices"}
    read |= set(rules.AXES)
    keys = leaves(config.default()) + leaves(config.source("x"), "source.")
    assert len(keys) > 45
    assert [key for key in keys if key.split(".")[-1] not in read] == []


def test_the_settings_of_the_default_config_are_the_defaults():
    assert config.to_settings(config.default()) == Settings()
    assert config.to_settings(Settings()) == Settings()
    json.dumps(config.to_dict(Settings()))


def test_settings_are_frozen_and_hold_what_the_config_holds(make_config):
    cfg = make_config(**{"log.trackers": ("tensorboard",), "optimizer.learning_rate": 1})
    cfg.data.template_args.tools = {"deep": [1, 2]}
    found = config.to_settings(cfg)
    assert found.data.train["main"] == Source(cfg.data.train.main.path)
    assert found.data.template_args == {"tools": {"deep": [1, 2]}}
    assert type(found.optimizer.learning_rate) is float and found.log.trackers == ("tensorboard",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch.rows = 1  # pyright: ignore
    cfg.batch.rows = 99
    assert found.batch.rows == 8


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("batch.rows", None, "batch.rows = None: use a value of type int"),
        ("data.shuffle", 1, "data.shuffle = 1: use a value of type bool"),
        ("data.cache_gb", math.inf, "data.cache_gb = inf: use at least 0, and a finite number"),
        ("batch.rows", True, "batch.rows = True: use a value of type int"),
        ("model.offload", "residual", "model.offload = 'residual': use a value of type tuple"),
        ("data.template_args", 3, "data.template_args = 3: use a value of type dict"),
        ("batch", 3, "batch = 3: use a value of type Batch"),
        ("batch.row", 3, "batch.row is no key of the config: did you mean batch.rows?"),
        ("sed", 3, "sed is no key of the config: did you mean seed?"),
        ("data.train", None, "data.train = None: use a value of type dict"),
        ("log.trackers", (["wandb"],), "log.trackers = (['wandb'],): use text only"),
        ("checkpoint.allow_changes", (1,), "checkpoint.allow_changes = (1,): use text only"),
        ("seed", 10**400, f"seed = {10**400}: use a value from 0 up to, not including, 2**63"),
        ("loss.z_loss", 10**400, f"loss.z_loss = {10**400}: use a value of type float"),
    ],
)
def test_a_config_made_by_hand_is_checked_key_by_key(make_config, key, value, problem):
    cfg = make_config().to_dict()
    *parents, leaf = key.split(".")
    section = cfg
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    assert problems(ConfigDict(cfg)) == [problem]


def test_scalars_of_numpy_and_enums_become_plain_values(make_config):
    class Backend(enum.StrEnum):
        BLOCKWISE = "blockwise"

    rate = np.float64(0.5)
    cfg = make_config(**{"optimizer.learning_rate": rate, "model.attention": Backend.BLOCKWISE})
    values = config.to_settings(cfg)
    assert values.optimizer.learning_rate == 0.5 and values.model.attention == "blockwise"
    assert type(values.optimizer.learning_rate) is float and type(values.model.attention) is str


def test_config_json_is_the_sorted_config(make_config):
    cfg = make_config()
    cfg.data.train.another = config.source(cfg.data.train.main.path)
    cfg.data.template_args.z, cfg.data.template_args.a = {"y": 1, "b": 2}, 1
    found = json.dumps(config.to_dict(cfg))
    assert found == json.dumps(cfg.to_dict()) == json.dumps(json.loads(found), sort_keys=True)


def test_choices_are_those_of_the_code():
    choices = {entry.name: set(entry.key.choices) for entry in settings.entries()}
    assert choices["model.attention"] == set(dispatch.BACKENDS)
    assert choices["data.train.NAME.format"] == {"", *formats.FORMATS}
    remat = next(entry.key.text for entry in settings.entries() if entry.name == "model.remat")
    assert all(name in remat for name in remat_names.NAMES)


def test_every_default_is_allowed_and_every_key_is_explained():
    for entry in settings.entries():
        assert entry.key.problem(entry.name, entry.default) == ""
        assert entry.key.text.endswith(".")
    assert settings.problems(Settings()) == []


def test_docs_config_md_is_the_one_that_the_settings_give():
    written = (PACKAGE.parent / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == config_help.as_markdown()


def test_help_config_lists_the_keys_of_a_prefix(capsys):
    for arguments in (["--help-config=optimizer"], ["--help-config", "optimizer", "--workdir=x"]):
        with pytest.raises(SystemExit) as ended:
            command_line.parse_flags(["train", *arguments])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and "\noptimizer.eps = 1e-08\n    Added to" in said
        assert not re.search(r"^(?!optimizer\.)\w", said, re.MULTILINE)
    with pytest.raises(SystemExit) as ended:
        command_line.parse_flags(["train", "--help-config"])
    assert ended.value.code == 0 and "data.seq_len = 2048 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command_line.parse_flags(["train", "--help-config=optimiser"])
    assert ended.value.code == 64 and "did you mean optimizer?" in capsys.readouterr().err


def test_the_default_config_is_valid_but_for_model_and_data():
    found = problems(config.default())
    assert sorted(text.split()[0] for text in found) == ["data.train", "model.path"]


def test_a_small_config_is_valid(make_config):
    resolved = validate(make_config(), 8)
    assert resolved.mesh_shape == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert resolved.micro_rows == 8 and resolved.model_cfg.num_layers == 3


@pytest.mark.parametrize("key", ["sed", "batch.row", "data.train.main.limits", "mesh.expert"])
def test_an_unknown_key_raises(make_config, key):
    cfg = make_config()
    *parents, leaf = key.split(".")
    for parent in parents:
        cfg = cfg[parent]
    with pytest.raises((KeyError, AttributeError), match=leaf):
        setattr(cfg, leaf, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch.rows", "8"),
        ("batch.rows", 8.5),
        ("data.shuffle", "no"),
        ("optimizer.learning_rate", "1e-5"),
        ("model.path", Path("model")),
        ("log.trackers", "wandb"),
        ("data.train.main.limit", "5"),
    ],
)
def test_a_value_of_the_wrong_type_raises(make_config, key, value):
    with pytest.raises(TypeError):
        make_config(**{key: value})


def test_a_whole_number_is_a_learning_rate_but_not_the_reverse():
    cfg = config.default()
    cfg.optimizer.learning_rate = 1
    assert isinstance(cfg.optimizer.learning_rate, float)


def test_a_source_knows_its_keys():
    assert config.source("x", prompt_key="question", limit=3).limit == 3
    with pytest.raises(KeyError, match=r"a data source has no key 'promt_key': use one of \["):
        config.source("x", promt_key="question")
    with pytest.raises(TypeError):
        config.source("x", limit="3")


def test_a_source_with_a_path_object_is_refused_or_stored(make_config):
    cfg = make_config()
    try:
        cfg.data.train.main = config.source(Path(cfg.data.train.main.path))
    except TypeError:
        return
    json.dumps(config.to_dict(cfg))


# ---- validation: everything at once --------------------------------------------------------------


def test_all_problems_are_reported_at_once(make_config):
    cfg = make_config(
        **{
            "seed": -1,
            "model.dtype": "float8",
            "model.attention": "flesh",
            "data.seq_len": 130,
            "data.train.main.path": "/nowhere.jsonl",
            "batch.rows": 6,
            "batch.micro_rows": 4,
            "mesh.fsdp": 1,
            "mesh.tensor": 2,
            "mesh.sequence": 4,
            "optimizer.schedule": "cosinus",
            "optimizer.b2": 1.0,
            "train.steps": 0,
            "train.epochs": 0.0,
            "checkpoint.keep_best": 1,
            "log.trackers": ("tensorbored",),
        }
    )
    cfg.data.eval.held = config.source("", format="xml", limit=-2)
    expected = [
        r"seed = -1: use a value from 0 up to, not including, 2\*\*63",
        r"model\.dtype = 'float8': use one of \['float32', 'bfloat16', 'float16'\]",
        r"model\.attention = 'flesh': use one of \[.*'auto'",
        r"data\.seq_len = 130 .* mesh\.sequence x mesh\.tensor = 8: use 136",
        r"data\.train\.main: source\.path = '/nowhere\.jsonl' does not exist",
        r"batch\.rows = 6 is not divisible by batch\.micro_rows = 4: use 4 rows",
        r"optimizer\.schedule = 'cosinus': use one of \['cosine', ",
        r"optimizer\.b2 = 1\.0: use a value from 0 up to, not including, 1",
        r"train\.epochs = 0\.0: use a positive value, or set train\.steps",
        r"checkpoint\.keep_best needs an evaluation .* set eval\.every_steps \(now 0\)",
        r"log\.trackers: 'tensorbored' is not one of \['tensorboard', 'wandb'\]",
        r"data\.eval\.held: source\.path is empty",
        r"data\.eval\.held: source\.format = 'xml': use one of",
        r"data\.eval\.held: source\.limit = -2: use at least 0",
    ]
    found = problems(cfg)
    for pattern in expected:
        assert sum(bool(re.search(pattern, text)) for text in found) == 1, pattern
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": ""}, r"model\.path is empty: name a model folder or a hub id"),
        ({"model.path": "/nowhere"}, r"model\.path = '/nowhere' is not a folder"),
        ({"model.path": "no/where"}, r"model\.path = 'no/where' is neither a folder here nor"),
        ({"model.remat": "some"}, r"model\.remat = 'some': use one of \['none', 'full'"),
        ({"model.param_dtype": "int8"}, r"model\.param_dtype = 'int8': use one of"),
        ({"data.seq_len": 0}, r"data\.seq_len = 0: use at least 1"),
        ({"data.seq_len": 264}, r"data\.seq_len = 264 .* max_position_embeddings = 256"),
        ({"data.packing": "worst_fit"}, r"data\.packing = 'worst_fit': use one of"),
        ({"data.overlong": "cut"}, r"data\.overlong = 'cut': use one of \['raise', 'drop'"),
        ({"data.max_segments": 0}, r"data\.max_segments = 0: use at least 1"),
        ({"batch.rows": 0}, r"batch\.rows = 0: use at least 1"),
        ({"batch.rows": 12}, r"batch\.rows = 12 .* data x fsdp = 8: use 8 or 16, or change"),
        ({"batch.rows": 4}, r"batch\.rows = 4 .* data x fsdp = 8: use 8, or change mesh"),
        ({"batch.micro_rows": 4}, r"batch\.micro_rows = 4 .* data x fsdp = 8: use 8, or"),
        ({"batch.micro_rows": 16}, r"batch\.rows = 8 .* batch\.micro_rows = 16: use 16 rows"),
        ({"train.steps": 0, "train.epochs": float("nan")}, r"train\.epochs = nan: use"),
        ({"optimizer.name": "sgd"}, r"optimizer\.name = 'sgd': use one of \['adamw'\]"),
        ({"optimizer.learning_rate": float("nan")}, r"optimizer\.learning_rate = nan: use"),
        ({"optimizer.learning_rate": float("inf")}, r"optimizer\.learning_rate = inf: use"),
        ({"optimizer.warmup": -0.1}, r"optimizer\.warmup = -0\.1: use at least 0"),
        ({"optimizer.final_ratio": 1.5}, r"optimizer\.final_ratio = 1\.5: use .* from 0 to 1"),
        ({"optimizer.eps": 0.0}, r"optimizer\.eps = 0\.0: use a value above 0"),
        ({"optimizer.clip_norm": -1.0}, r"optimizer\.clip_norm = -1\.0: use at least 0"),
        ({"mesh.fsdp": 3}, r"mesh\.fsdp = 3, .* need 3 devices, there are 8: make the sizes"),
        ({"mesh.fsdp": 0}, r"mesh\.fsdp = 0, .*: use positive sizes, at most one of them -1"),
        ({"mesh.data": -1}, r"mesh\.data = -1, mesh\.fsdp = -1.*: use positive sizes, at most"),
        ({"mesh.tensor": 3}, r"mesh\.tensor = 3, .* need 3 devices, there are 8"),
        ({"checkpoint.keep": 0}, r"checkpoint\.keep = 0: use at least 1"),
        ({"log.every_steps": 0}, r"log\.every_steps = 0: use at least 1"),
    ],
)
def test_a_problem_names_its_key_and_the_remedy(make_config, changes, message):
    found = problems(make_config(**changes))
    assert len(found) == 1 and re.search(message, found[0]), found


@pytest.mark.parametrize(
    ("model", "tensor", "message"),
    [
        (
            {"num_attention_heads": 6},
            4,
            r"heads = 6 \(of .*q\.\w+\) .* mesh\.tensor = 4: .* \[1, 2",
        ),
        ({}, 4, r"kv_heads = 2 \(of .*k\.\w+\) .* mesh\.tensor = 4: use one of \[1, 2\]"),
        ({"intermediate_size": 81}, 2, r"mlp = 81 \(of .*\) .* mesh\.tensor = 2: use one of \[1\]"),
        (
            {"hidden_size": 44, "head_dim": 12},
            1,
            r"embed = 44 \(of .*\) .* mesh\.fsdp = 8: use one of \[1, 2, 4\]",
        ),
    ],
)
def test_a_dimension_that_the_mesh_does_not_divide_is_named(
    make_config, make_model, model, tensor, message
):
    cfg = make_config(make_model(**model), **{"mesh.tensor": tensor})
    found = [text for text in problems(cfg) if re.match(message.split()[0] + " = ", text)]
    assert len(found) == 1 and re.search(message, found[0]), found


def test_a_vocabulary_that_the_mesh_does_not_divide_is_no_problem(make_config, make_model):
    cfg = make_config(make_model(vocab_size=271), **{"mesh.tensor": 2, "mesh.fsdp": 4})
    assert validate(cfg, 8).model_cfg.vocab == 271


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json: it is not a model folder"),
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json must hold a JSON object, not a list"),
        ('{"model_type": "gpt9"}', "model_type 'gpt9' is not supported: use one of"),
        ('{"model_type": "layers"}', "model_type 'layers' is not supported: use one of"),
        ('{"model_type": "qwen2"}', "config.json has no 'num_attention_heads', which qwen2 needs"),
    ],
)
def test_a_folder_that_is_no_model_is_reported_with_the_other_problems(
    make_config, make_model, content, message
):
    model = make_model()
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    found = problems(make_config(model, seed=-1))
    assert [message in text for text in found] == [False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_size": "48"},
        {"rope_theta": "x"},
        {"max_position_embeddings": "x"},
        {"layer_types": 3},
    ],
)
def test_a_config_json_with_impossible_values_is_a_problem(make_config, make_model, changes):
    model = make_model()
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | changes))
    assert problems(make_config(model)) != []


def test_what_is_not_a_source_is_a_problem(make_config):
    cfg = make_config()
    path = cfg.data.train.main.path
    cfg.data.train.other = path
    expected = "data.train.other is not a source: write data.train.other = config.source(path)"
    assert problems(cfg) == [expected]
    cfg.data.train = config.source(path)
    expected = "data.train has no name: write data.train.NAME = config.source(path)"
    assert problems(cfg) == [expected]
    cfg.data.train = {"main": {"path": path, "limits": 3}}
    expected = "data.train.main.limits is no key of the config: did you mean data.train.main.limit?"
    assert problems(cfg) == [expected]
    cfg.data.train.main = {"path": path}
    assert validate(cfg, 8).data.train == {"main": Source(path)}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"checkpoint.every_steps": 0}, True),  # the final step alone, always evaluated
        ({"checkpoint.every_steps": 15}, False),
        ({"eval.every_steps": 0}, False),
        ({"checkpoint.metric": "eval/held/loss"}, True),
        ({"checkpoint.metric": "eval/other/loss"}, False),
        ({"checkpoint.metric": "loss"}, False),
    ],
)
def test_keeping_the_best_needs_its_metric_at_every_save(make_config, changes, valid):
    changes = {
        **{"checkpoint.keep_best": 1, "checkpoint.every_steps": 20, "eval.every_steps": 10},
        **changes,
    }
    cfg = make_config(**changes)
    cfg.data.eval.held = config.source(cfg.data.train.main.path)
    found = problems(cfg)
    assert (found == []) if valid else (len(found) == 1 and "checkpoint." in found[0])


def test_a_tracker_whose_package_is_missing_names_the_command(make_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = problems(make_config(**{"log.trackers": ("wandb",)}))
    assert found == ["log.trackers: 'wandb' needs `pip install wandb`"]


@pytest.mark.parametrize(
    ("sizes", "resolved"),
    [
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((1, -1, 2, 2), (1, 2, 2, 2)),
        ((2, 2, -1, 1), (2, 2, 2, 1)),
        ((1, 1, 8, -1), (1, 1, 8, 1)),
        ((2, 2, 2, 1), (2, 2, 2, 1)),
        ((1, -1, 3, 1), None),
        ((1, 1, 16, -1), None),
        ((1, 1, 1, 1), None),
        ((1, -2, 1, 1), None),
    ],
)
def test_minus_one_is_what_is_left_of_the_devices(sizes, resolved):
    mesh = config.default().mesh
    for axis, size in zip(rules.AXES, sizes, strict=True):
        mesh[axis] = size
    if resolved is None:
        with pytest.raises(ValueError, match="mesh.tensor = "):
            mesh_shape(mesh, 8)
    else:
        assert tuple(mesh_shape(mesh, 8).values()) == resolved


def test_an_unknown_logical_axis_raises():
    with pytest.raises(ValueError, match="'nobody' has no rule: add it to rules.RULES"):
        rules.spec("layers", "nobody")


# ---- the command line, and config.json -----------------------------------------------------------


@pytest.fixture
def from_command_line(tmp_path, monkeypatch):
    """Parse command line arguments over a config file, as `python -m jax_sft.train` does."""
    file = tmp_path / "from_test.py"
    file.write_text(
        "from jax_sft import config\n\ndef get_config():\n    cfg = config.default()\n"
        "    cfg.batch.rows = 16\n    cfg.data.train.main = config.source('a.jsonl')\n"
        "    return cfg\n"
    )

    def parse(*arguments: str) -> ConfigDict:
        argv = ["train", f"--config={file}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # config_flags finds the overrides there
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        values(argv)
        return values.config

    return parse


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_line_overrides_the_file_which_overrides_the_default(from_command_line):
    cfg = from_command_line(
        *("--config.optimizer.learning_rate=2e-5", "--config.data.train.main.path=b.jsonl"),
        *("--config.data.shuffle=False", "--config.log.trackers=('tensorboard',)"),
        *("--config.data.train.main.limit=7", "--config.mesh.tensor", "4"),
    )
    assert cfg.batch.rows == 16 and cfg.seed == 0
    assert cfg.optimizer.learning_rate == 2e-5
    assert (cfg.data.train.main.path, cfg.data.train.main.limit) == ("b.jsonl", 7)
    assert cfg.data.shuffle is False and cfg.mesh.tensor == 4
    assert tuple(cfg.log.trackers) == ("tensorboard",)


# ml_collections loads the file with load_module; Python 3.12 has kept it after all.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("--config.batch.row=8", AttributeError),
        ("--config.batch.rows=many", flags.IllegalFlagValueError),
        ("--config.data.train.other.path=x", KeyError),
        ("--confg.batch.rows=8", flags.UnrecognizedFlagError),
    ],
)
def test_a_wrong_argument_stops_the_command(from_command_line, argument, error):
    with pytest.raises(error):
        from_command_line(argument)


def test_config_json_holds_the_config_exactly(make_config):
    as_dict = config.to_dict(make_config(**{"log.trackers": ("tensorboard",)}))
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert config.differences(json.loads(json.dumps(as_dict)), as_dict) == {}


def test_differences_names_every_changed_leaf(make_config):
    cfg = make_config()
    old = config.to_dict(cfg)
    cfg.optimizer.b1, cfg.log.trackers = 0.8, ("wandb",)
    cfg.data.eval.held = config.source("x.jsonl")
    del cfg.data.train["main"]
    lines = config.differences(old, config.to_dict(cfg))
    assert lines["optimizer.b1"] == "optimizer.b1: 0.9 -> 0.8"
    assert lines["log.trackers"] == "log.trackers: [] -> ['wandb']"
    assert [*lines] == ["data.eval.held", "data.train.main", "log.trackers", "optimizer.b1"]
    assert config.differences(old, old) == {}


def test_the_command_of_an_advice_is_the_one_that_was_given_and_the_changes(monkeypatch):
    given = ["--config=my configs/a.py", "--workdir=run[1]", "--config.model.path=$HOME", "--x"]
    changes = {"train.epochs": "2", "checkpoint.allow_changes": ("train.epochs", "seed")}
    added = [
        "--config.train.epochs=2",
        "--config.checkpoint.allow_changes=('train.epochs', 'seed')",
    ]
    monkeypatch.delenv("JAX_SFT_NUM_PROCESSES", raising=False)
    monkeypatch.setattr("sys.argv", ["/here/jax_sft/train.py", *given])
    advice = command_line.again(changes)
    assert shlex.split(advice) == ["python", "-m", "jax_sft.train", *given, *added]
    assert "--config.checkpoint.allow_changes=\"('train.epochs', 'seed')\"" in advice
    monkeypatch.setattr("sys.argv", ["notebook"])
    assert shlex.split(command_line.again(changes)) == ["the", "same", "command", "with", *added]


@pytest.mark.parametrize(
    "dropout, experts, is_bound", [(0.0, False, False), (0.1, False, True), (0.0, True, True)]
)
def test_micro_rows_are_not_free_where_they_change_losses(dropout, experts, is_bound):
    axis_sizes = {"experts": 4} if experts else {}
    model_cfg = SimpleNamespace(axis_sizes=axis_sizes, router_aux=0.01)
    adapters = SimpleNamespace(dropout=dropout)
    settings = SimpleNamespace(adapters=adapters, loss=Loss(), model_cfg=model_cfg)
    bound = open_state.bound_keys(settings)
    assert bound == (("batch.micro_rows",) if is_bound else ())


@pytest.mark.parametrize("option", [["--config=configs/{}"], ["--config", "configs/{}:small"]])
@pytest.mark.parametrize("name", ["qwen7b.py", "my own.py"])
def test_a_config_file_that_is_not_there_is_named_with_an_example(
    monkeypatch, tmp_path, capsys, option, name
):
    monkeypatch.chdir(tmp_path)
    argv = ["train", *(word.format(name) for word in option), "--config.seed=1"]
    with pytest.raises(SystemExit) as ended:
        command_line.parse_flags(argv)
    examples = Path(jax_sft.__file__).parent.parent / "configs"
    advice = (
        "examples are in " if name == "my own.py" else f"use --config={examples / name}, or a copy"
    )
    said = capsys.readouterr().err
    assert ended.value.code == 64
    assert f"there is no config file configs/{name} in {tmp_path}: {advice}" in said


def test_a_config_file_that_is_there_is_required_and_no_more(tmp_path):
    (tmp_path / "a b.py").write_text("")
    for option in ([f"--config={tmp_path}/a b.py:x"], ["--config", f"{tmp_path}/a b.py"], []):
        command_line.require_config_file(
            ["train", *option, "--config.data.train.main.path=none.jsonl"]
        )
