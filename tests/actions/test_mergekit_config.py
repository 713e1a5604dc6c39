"""Files of mergekit's as merges of this package's engine: what each means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mergekit_files import TWO, linear, names, read, slices, ties

from hsa.actions.mergekit_config.config_request import Model, ModelName
from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.actions.mergekit_config.request import path_of

# --- models and base --------------------------------------------------------------------------------------------------

MODELS = {
    "linear without base": (linear("{weight: 1}"), None, ["a", "b"], "a"),
    "base counts in linear, last": (linear("{weight: 1}", "base_model: x"), None, ["a", "b", "x"], "x"),
    "base counts in its place": (linear("{weight: 1}", "base_model: a"), None, ["a", "b"], "a"),
    "base counts in karcher": (f"merge_method: karcher\n{TWO}\nbase_model: x", None, ["a", "b", "x"], "x"),
    "base is no model of ties": (ties(), "base", ["a", "b"], "base"),
    "base may stand among the models": (
        ties().replace("[{model: a", "[{model: base}, {model: a"),
        "base",
        ["a", "b"],
        "base",
    ),
    "slerp": (f"merge_method: slerp\n{TWO}\nbase_model: b\nparameters: {{t: 0.5}}", "b", ["a"], "b"),
    "nuslerp without base": (f"merge_method: nuslerp\n{TWO}\nparameters: {{weight: 1}}", None, ["a", "b"], "a"),
    "nuslerp with base": (
        f"merge_method: nuslerp\n{TWO}\nbase_model: x\nparameters: {{weight: 1}}",
        "x",
        ["a", "b"],
        "x",
    ),
    "model stock": (f"merge_method: model_stock\n{TWO}\nbase_model: x", "x", ["a", "b"], "x"),
    "hsa": (f"merge_method: hsa\n{TWO}\nbase_model: x", "x", ["a", "b"], "a"),
    "hsa by roles": (
        "merge_method: hsa\nbase_model: x\nmodels: [{model: a, parameters: {role: secondary}}, {model: b}]",
        "x",
        ["b", "a"],
        "b",
    ),
    "adapters": (ties().replace("model: a", "model: base+l@v"), "base", ["base+l@v", "b"], "base"),
    "revisions": (ties().replace("model: a", "model: org/m@v1"), "base", ["org/m@v1", "b"], "base"),
    "mappings": (
        ties()
        .replace("base_model: base", "base_model: {model: {path: o+r, revision: v}}")
        .replace("model: a", "model: {model: {path: o+r, revision: v}, lora: l}"),
        "o+r@v",
        ["o+r@v+l", "b"],
        "o+r@v",
    ),
}


@pytest.mark.parametrize(("text", "base", "models", "donor"), MODELS.values(), ids=MODELS)
def test_models_are_in_order_and_base_is_what_the_method_takes_it_for(
    text: str, base: str | None, models: list[str], donor: str
) -> None:
    found = read(text)
    assert (found.base and str(found.base), names(found.models)) == (base, models)
    assert str(found.config_from) == str(found.tokenizer_from) == donor
    assert not found.findings.warnings and not found.same_vocabulary and found.dtype == "auto"


def test_an_adapter_is_opened_and_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert path_of(Model(ModelName("org/m", "v1"))) == ("org/m@v1", None)
    assert path_of(Model(ModelName("org/m"), ModelName("org/l", "v1"))) == ("org/l@v1", None)
    (tmp_path / "org/m").mkdir()
    path, note = path_of(Model(ModelName("org/m", "v1")))
    assert (path, note) == (Path("org/m"), "org/m exists here, so that its revision v1 says nothing")


# --- values -----------------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "a number": (linear("{weight: 0.5}"), {"weights": (0.5, 0.5)}),
    "a number in scientific notation": (linear("{weight: 1e-1}"), {"weights": (0.1, 0.1)}),
    "a number in quotes": (linear("{weight: '1e-1'}"), {"weights": (0.1, 0.1)}),
    "flags": (linear("{weight: 1, normalize: no}"), {"weights": (1.0, 1.0), "normalize": False}),
    "flags as numbers": (linear("{weight: 1, normalize: 0}"), {"weights": (1.0, 1.0), "normalize": False}),
    "flags as texts": (linear("{weight: 1, normalize: 'True'}"), {"weights": (1.0, 1.0), "normalize": True}),
    "a model's own": (ties("{weight: 0.25}"), {"weights": (0.25, 1.0)}),
    "negative": (ties("{weight: -0.25}"), {"weights": (-0.25, 1.0)}),
    "what one model lacks is mergekit's default": (
        ties("{density: 0.5}"),
        {"weights": (1.0, 1.0), "density": (0.5, 1.0)},
    ),
    "lambda": (ties(whole="{weight: 1, lambda: 2}"), {"weights": (1.0, 1.0), "lam": 2.0}),
    "over the layers": (ties("{weight: [0, 0.5, 1]}"), {"weights": ((0.0, 0.5, 1.0), 1.0)}),
    "a list of one": (ties("{weight: [0.5]}"), {"weights": (0.5, 1.0)}),
    "an empty list sets nothing": (ties("{weight: []}"), {"weights": (1.0, 1.0)}),
    "equal over the layers": (ties("{weight: [0.5, 0.5]}"), {"weights": (0.5, 1.0)}),
    "a filter, and the rest from the wider scope": (
        ties("{weight: [{filter: fc1, value: 0.2}]}"),
        {"weights": (({"filter": "fc1", "value": 0.2}, 1.0), 1.0)},
    ),
    "a filter that is no list": (
        ties("{weight: {filter: fc1, value: 0.2}}"),
        {"weights": (({"filter": "fc1", "value": 0.2}, 1.0), 1.0)},
    ),
    "filters and a default": (
        ties("{density: [{filter: fc1, value: [0, 1]}, {filter: fc2, value: 0.3}, {value: 0.4}]}"),
        {
            "weights": (1.0, 1.0),
            "density": (({"filter": "fc1", "value": (0.0, 1.0)}, {"filter": "fc2", "value": 0.3}, 0.4), 1.0),
        },
    ),
    "filters without a default of their own": (
        ties("{density: [{filter: fc1, value: 0.3}]}"),
        {"weights": (1.0, 1.0), "density": (({"filter": "fc1", "value": 0.3}, 1.0), 1.0)},
    ),
    "a star is for all": (ties("{weight: [{filter: '*', value: 0.4}, {value: 3}]}"), {"weights": (0.4, 1.0)}),
    "an empty filter is for all": (ties("{weight: [{filter: '', value: 0.4}]}"), {"weights": (0.4, 1.0)}),
    "filters of two scopes": (
        ties("{weight: [{filter: a, value: 1}]}", whole="{weight: [{filter: b, value: 2}, {value: 3}]}"),
        {
            "weights": (
                ({"filter": "a", "value": 1.0}, {"filter": "b", "value": 2.0}, 3.0),
                ({"filter": "b", "value": 2.0}, 3.0),
            )
        },
    ),
    "a required value for some tensors alone": (
        ties(whole="{weight: [{filter: fc1, value: 1}]}"),
        {"weights": (({"filter": "fc1", "value": 1.0},),) * 2},
    ),
    "filters that say one thing": (
        ties(whole="{weight: 1, lambda: [{filter: fc1, value: 2}, {value: 2}]}"),
        {"weights": (1.0, 1.0), "lam": 2.0},
    ),
    "normalize for a filter and for all others": (
        ties(whole="{weight: 1, normalize: [{filter: fc1, value: true}]}"),
        {"weights": (1.0, 1.0), "normalize": True},
    ),
    "nuslerp's flags": (
        f"merge_method: nuslerp\n{TWO}\nparameters: {{weight: 1, nuslerp_row_wise: true, nuslerp_flatten: false}}",
        {"weights": (1.0, 1.0), "row_wise": True, "flatten": False},
    ),
    "karcher": (
        f"merge_method: karcher\n{TWO}\nparameters: {{max_iter: 5.0, tol: 1e-6}}",
        {"max_iter": 5, "tol": 1e-6},
    ),
    "hsa": (
        f"merge_method: hsa\nbase_model: x\n{TWO}\nparameters: {{k: 0.3, lambda: [0, 1], targets: attention-qkv}}",
        {"k": 0.3, "lam": (0.0, 1.0), "targets": "attention-qkv"},
    ),
    "della's own": (
        ties("{epsilon: 0.1}").replace("ties", "della"),
        {"weights": (1.0, 1.0), "epsilon": (0.1, 0.15)},
    ),
    "int8_mask changes nothing": (ties(whole="{weight: 1, int8_mask: true}"), {"weights": (1.0, 1.0)}),
}


@pytest.mark.parametrize(("text", "expected"), VALUES.values(), ids=VALUES)
def test_values_of_all_scopes_become_settings(text: str, expected: dict[str, Any]) -> None:
    found = read(text)
    assert found.settings == expected
    assert not found.findings.warnings and not found.layers


def test_places_say_where_a_setting_stands() -> None:
    found = read(ties("{density: 0.5}"))
    assert found.places["density"] == "c.yml:3: models[0].parameters.density"
    assert found.places["weights"] == "c.yml:4: parameters.weight"


# --- slices and modules -----------------------------------------------------------------------------------------------


def test_one_slice_of_all_layers_is_as_models_are() -> None:
    found = read(slices((0, 32), parameters="{t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}"))
    assert found.settings == {"t": ({"filter": "mlp", "value": (0.0, 1.0)}, 0.5)}
    assert (names(found.models), found.layers) == (["b"], {None: 32})


def test_slices_in_their_places_have_values_of_their_own() -> None:
    found = read(slices((0, 8), (8, 32), each="{t: [N, 1]}"))
    assert found.settings["t"] == (
        {"layers": (0, 7), "value": (0.0, 1.0)},
        {"layers": (8, None), "value": 1.0},
    )
    assert found.layers == {None: 32}


def test_slices_that_say_the_same_are_one() -> None:
    assert read(slices((0, 8), (8, 32))).settings == {"t": 0.5}
    ramp = read(slices((0, 8), (8, 32), parameters="{t: [0, 1]}")).settings["t"]
    assert [entry["layers"] for entry in ramp] == [(0, 7), (8, None)]


def test_modules_have_values_of_their_own() -> None:
    module = "{models: [{model: a, parameters: {weight: W}}, {model: b}], parameters: {weight: [0, 1]}}"
    modules = f"{{encoder: {module.replace('W', '2')}, decoder: {module.replace('W', '[2, 3]')}}}"
    found = read(f"merge_method: linear\nmodules: {modules}")
    assert found.settings["weights"] == (
        ({"stack": "encoder", "value": 2.0}, {"stack": "decoder", "value": (2.0, 3.0)}),
        (0.0, 1.0),
    )


# --- the output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dtype", "notes"),
    [
        ("", "auto", 0),
        ("dtype:", "auto", 0),
        ("dtype: float32", "float32", 0),
        ("dtype: torch.bfloat16", "bfloat16", 1),
        ("out_dtype: float16", "float16", 0),
        ("dtype: bfloat16\nout_dtype: float32", "float32", 1),
    ],
)
def test_the_element_type_of_the_output(text: str, dtype: str, notes: int) -> None:
    found = read(linear("{weight: 1}", text))
    assert (found.dtype, len(found.findings.notes)) == (dtype, notes)


@pytest.mark.parametrize(
    ("text", "model", "same"),
    [
        ("tokenizer_source:", "base", False),
        ("tokenizer_source: base", "base", True),
        ("tokenizer_source: union", "base", True),
        ("tokenizer_source: b", "b", True),
        ("tokenizer: {source: base}", "base", True),
        ("tokenizer: {source: union, tokens: {}, pad_to_multiple_of: null}", "base", True),
        ("tokenizer: {}", "base", True),
        ("tokenizer: {source: a}", "a", True),
    ],
)
def test_whose_tokenizer_the_output_has(text: str, model: str, same: bool) -> None:
    found = read(ties(more=text))
    assert (str(found.tokenizer_from), found.same_vocabulary) == (model, same)
    assert str(found.config_from) == "base"


# --- the page of the documentation ------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_is_read() -> None:
    example = PAGE.partition("```yaml\n")[2].partition("```")[0]
    found = read(example)
    assert (found.method, str(found.base), found.dtype) == ("ties", "openai/whisper-small", "float16")
    assert found.settings["density"] == ((0.3, 0.5, 0.9), 0.5)
    assert not found.findings.notes and not found.findings.warnings


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_the_page_names_every_parameter(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `") and f"`{name}`" in line.split(" | ")[0]]
    listed = row.split(" | ")[2]
    for parameter in METHODS[name].parameters:
        assert (f"`{parameter.name}`" in listed) == parameter.has_effect, parameter.name
