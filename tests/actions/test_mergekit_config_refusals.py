"""Files of mergekit's that cannot be: what is ignored with a warning, and what is refused, in which line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_files import TWO, linear, read, slices, ties

from hsa.actions.mergekit_config.merge_methods import METHODS, NOT_HERE
from hsa.actions.mergekit_config.request import MAX_BYTES, load, loads
from hsa.errors import HsaError, RequestError, SourceError

# --- warnings ---------------------------------------------------------------------------------------------------------

WARNED = {
    "a typo": (
        ties("{densty: 0.5}"),
        "c.yml:3: models[0].parameters.densty is ignored: method ties has no densty; did you mean density?",
    ),
    "a typo above": (
        linear("{weight: 1, normalise: false}"),
        "c.yml:3: parameters.normalise is ignored: method linear has no normalise; did you mean normalize?",
    ),
    "of another method": (
        linear("{weight: 1, int8_mask: true}"),
        "parameters.int8_mask is ignored: method linear has no int8_mask",
    ),
    "one for all": (ties("{lambda: 2}"), "models[0].parameters.lambda is ignored: lambda is one value for all models"),
    "base's": (
        ties().replace("[{model: a", "[{model: base, parameters: {weight: 1}}, {model: a"),
        "models[0].parameters.weight is ignored: the model is base_model",
    ),
    "a key": (linear("{weight: 1}", "nmae: x"), "c.yml:4: nmae is ignored, as mergekit ignores it"),
    "a near key": (
        linear("{weight: 1}", "out_dtpye: float32"),
        "out_dtpye is ignored, as mergekit ignores it; did you mean out_dtype?",
    ),
    "beside the model": (
        ties().replace("{model: b", "{model: b, density: 0.5"),
        "models[1].density is ignored, as mergekit ignores it; parameters belong under the key parameters",
    ),
    "in a slice": (
        slices((0, 2)).replace("parameters: {}}", "residual_weight: 1, parameters: {}}"),
        "slices[0].residual_weight is ignored",
    ),
    "a pattern": (ties("{density: [{filter: 'self_*', value: 0.5}]}"), "'self_*' is part of no tensor's name"),
    "beside a filter": (ties("{density: [{filter: fc1, value: 0.5, lambda: 1}]}"), "density[0].lambda is ignored"),
    "a bare default": (
        ties("{density: [{filter: fc1, value: 0.5}, 0.6]}"),
        "models[0].parameters.density[1] is taken for all other tensors; mergekit itself wants it as value: 0.6",
    ),
    "density without sparsification": (
        ties("{density: 0.5}").replace("ties", "task_arithmetic"),
        "models[0].parameters.density changes nothing",
    ),
}


@pytest.mark.parametrize(("text", "warning"), WARNED.values(), ids=WARNED)
def test_what_mergekit_ignores_is_a_warning(text: str, warning: str) -> None:
    (found,) = read(text).findings.warnings
    assert warning in found and "\n" not in found


def test_a_bare_default_counts_all_the_same() -> None:
    found = read(ties("{density: [{filter: fc1, value: 0.5}, 0.6]}"))
    assert found.settings["density"] == (({"filter": "fc1", "value": 0.5}, 0.6), 1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "no YAML": ("a: [", "c.yml:1: is not valid YAML"),
    "a list": ("- a", "c.yml:1: the document must be a mapping of keys to values, got a list"),
    "anchors": (linear("&x {weight: 1}"), "c.yml:3: the anchor &x is not allowed"),
    "a repeated key": (
        linear("{weight: 1}", "dtype: float32\ndtype: float16"),
        "c.yml:5: the key 'dtype' stands in line 4 already",
    ),
    "no method": (TWO, "c.yml:1: the document has no merge_method"),
    "a null method": (f"merge_method:\n{TWO}", "the document has no merge_method"),
    "an unknown method": (
        linear("{}").replace("linear", "linaer"),
        "c.yml:1: merge_method is 'linaer', which mergekit does not have; did you mean linear?",
    ),
    "another unknown method": (
        linear("{}").replace("linear", "zzz"),
        "which mergekit does not have; there are linear, task_arithmetic",
    ),
    "a method of mergekit's alone": (
        linear("{}").replace("linear", "passthrough"),
        "c.yml:1: merge_method is passthrough, which is mergekit's alone; run mergekit itself on the file: hsa mer",
    ),
    "a number as method": (
        linear("{}").replace("linear", "1"),
        "merge_method must be the name of a merge method, got 1; put it in quotes",
    ),
    "no models": ("merge_method: linear\nmodels: []", "must have one of models, slices and modules, got none of them"),
    "models and slices": (slices((0, 1)) + TWO, "must have one of models, slices and modules, got models and slices"),
    "models of another kind": ("merge_method: linear\nmodels: a", "c.yml:2: models must be a list of models, got 'a'"),
    "a model of another kind": ("merge_method: linear\nmodels: [a]", "c.yml:2: models[0] must be a mapping"),
    "a model without a model": ("merge_method: linear\nmodels: [{parameters: {}}]", "models[0] has no model"),
    "a number as model": (
        "merge_method: linear\nmodels: [{model: 5}]",
        "models[0].model must be a directory or a hub id, got 5; put it in quotes",
    ),
    "an empty model": (
        "merge_method: linear\nmodels: [{model: ''}]",
        "models[0].model must be a directory or a hub id, got ''",
    ),
    "two revisions": (
        linear("{}").replace("model: a", "model: a@b@c"),
        "models[0].model is 'a@b@c', with more than one '@'",
    ),
    "two adapters": (
        linear("{}").replace("model: a", "model: a+b+c"),
        "models[0].model is 'a+b+c', with more than one '+'",
    ),
    "an adapter of nothing": (
        linear("{}").replace("model: a", "model: +b"),
        "models[0].model is '+b', which names no model",
    ),
    "a nested model without a path": (
        linear("{}").replace("model: a", "model: {model: {revision: v}}"),
        "models[0].model.model has no path",
    ),
    "another architecture": (
        linear("{}").replace("model: a", "model: {model: a, override_architecture: X}"),
        "models[0].model.override_architecture is not supported; expected model and lora; the architecture is read",
    ),
    "a model twice": (
        linear("{}").replace("model: b", "model: a"),
        "c.yml:2: models[1].model is 'a', which models[0] is too; name each model once",
    ),
    "an adapter on another model": (
        ties().replace("model: a", "model: other+l"),
        "c.yml:3: models[0] is an adapter on 'other', which is not base_model: adapters are read on base alone",
    ),
    "an adapter without base": (
        linear("{weight: 1}").replace("model: a", "model: a+l"),
        "models[0] is an adapter on 'a', and method linear has no base: adapters are read on base alone",
    ),
    "no base": (
        ties().replace("base_model: base\n", ""),
        "c.yml:1: the document has no base_model, which method ties needs; name it",
    ),
    "base as an adapter": (
        ties().replace("base_model: base", "base_model: base+l"),
        "base_model is 'base+l': base cannot be an adapter",
    ),
    "one model for slerp": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 0.5}",
        "merge_method is slerp, which takes 2 models, base among them, got 1",
    ),
    "three models for slerp": (
        f"merge_method: slerp\nbase_model: x\n{TWO}\nparameters: {{t: 0.5}}",
        "slerp, which takes 2 models, base among them, got 3",
    ),
    "three models for nuslerp": (
        "merge_method: nuslerp\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: 1}",
        "nuslerp, which takes 2 models besides base, got 3",
    ),
    "two models for model stock": (
        f"merge_method: model_stock\nbase_model: a\n{TWO}",
        "model_stock, which takes at least 3 models, base among them, got 2",
    ),
    "no weight": (
        linear("{}"),
        "c.yml:2: models[0] has no weight, which method linear needs for each model; write parameters: {weight: ...}",
    ),
    "base without a weight": (
        "merge_method: linear\nbase_model: x\nmodels: [{model: a, parameters: {weight: 1}}]",
        "c.yml:2: base_model counts as one of the models of linear and has no weight: leave it out, or name it",
    ),
    "no t": (slices((0, 2), parameters="{}"), "c.yml:1: the document has no parameters.t, which method slerp needs"),
    "a text for a number": (linear("{weight: much}"), "c.yml:3: parameters.weight must be a finite number, got 'much'"),
    "a flag for a number": (linear("{weight: true}"), "parameters.weight must be a finite number, got True"),
    "nothing for a number": (linear("{weight: }"), "parameters.weight must be a finite number, got None"),
    "infinity": (linear("{weight: .inf}"), "parameters.weight must be a finite number, got inf"),
    "not a number": (linear("{weight: [0, .nan]}"), "parameters.weight[1] must be a finite number, got nan"),
    "a number for a flag": (linear("{weight: 1, normalize: 2}"), "parameters.normalize must be true or false, got 2"),
    "a flag that is none, though it changes nothing": (
        ties(whole="{weight: 1, int8_mask: maybe}"),
        "parameters.int8_mask must be true or false, got 'maybe'",
    ),
    "a fraction for a whole number": (
        f"merge_method: karcher\n{TWO}\nparameters: {{max_iter: 2.5}}",
        "parameters.max_iter must be a whole number, got 2.5",
    ),
    "a list in a list": (linear("{weight: [0, [1]]}"), "parameters.weight[1] must be a finite number, got a list"),
    "a value among filters": (
        linear("{weight: [0.5, {filter: a, value: 1}]}"),
        "parameters.weight[0] has no filter; only the last entry",
    ),
    "a filter without a value": (
        linear("{weight: [{filter: a}]}"),
        "parameters.weight[0] has no value; expected filter and value",
    ),
    "an empty list behind a filter": (
        linear("{weight: [{filter: a, value: []}]}"),
        "parameters.weight[0].value is an empty list",
    ),
    "a number as filter": (
        linear("{weight: [{filter: 3, value: 1}]}"),
        "parameters.weight[0].filter must be a part of tensor names, got 3; put it in quotes",
    ),
    "filters in filters": (
        linear("{weight: [{filter: a, value: [{value: 1}]}]}"),
        "parameters.weight[0].value[0] must be a finite number, got a mapping",
    ),
    "parameters of another kind": (
        linear("[1]"),
        "c.yml:3: parameters must be a mapping of parameters to values, got a list",
    ),
    "normalize by filter": (
        ties(whole="{weight: 1, normalize: [{filter: a, value: false}]}"),
        "c.yml:4: parameters.normalize differs among tensors; normalize has one value for all here",
    ),
    "a dtype of mergekit's alone": (
        linear("{weight: 1}", "dtype: float64"),
        "c.yml:4: dtype must be one of float32, float16, bfloat16, got 'float64'",
    ),
    "a number as dtype": (
        linear("{weight: 1}", "out_dtype: 16"),
        "out_dtype must be one of float32, float16, bfloat16, got 16",
    ),
    "a chat template": (
        linear("{weight: 1}", "chat_template: chatml"),
        "c.yml:4: chat_template is not supported, for tokenizers are copied",
    ),
    "a tokenizer twice": (
        linear("{weight: 1}", "tokenizer_source: base\ntokenizer: {source: base}"),
        "c.yml:5: tokenizer cannot be combined with tokenizer_source",
    ),
    "embeddings by token": (
        linear("{weight: 1}", "tokenizer: {source: base, tokens: {x: {source: a}}}"),
        "tokenizer.tokens is not supported",
    ),
    "padded embeddings": (
        linear("{weight: 1}", "tokenizer: {pad_to_multiple_of: 8}"),
        "tokenizer.pad_to_multiple_of is not supported",
    ),
    "another model's tokenizer": (
        linear("{weight: 1}", "tokenizer_source: z"),
        "tokenizer_source is 'z', which is none of the models; expected base, union, or one of them",
    ),
    "roles twice": (
        ties("{role: primary}", "{role: primary}", "{}").replace("ties", "hsa"),
        "c.yml:3: models[0].parameters.role: a and b both have the role primary",
    ),
    "hsa of slices": (
        slices((0, 2)).replace("slerp", "hsa"),
        "slices cannot be with merge_method hsa, which merges whole models",
    ),
    "a slice without sources": ("merge_method: slerp\nbase_model: a\nslices: [{}]", "slices[0] has no sources"),
    "a slice of nothing": ("merge_method: slerp\nbase_model: a\nslices: [{sources: []}]", "slices[0].sources is empty"),
    "no layers": (
        "merge_method: slerp\nbase_model: a\nslices: [{sources: [{model: a}]}]",
        "slices[0].sources[0] has no layer_range; write [FIRST, END]",
    ),
    "layers of another kind": (
        slices((0, 2)).replace("[0, 2]", "[0, x]"),
        "slices[0].sources[0].layer_range must be two whole numbers, [FIRST, END], got [0, 'x']",
    ),
    "layers backwards": (
        slices((4, 2)),
        "slices[0].sources[0].layer_range is [4, 2]; expected [FIRST, END] with 0 <= FIRST < END",
    ),
    "layers without number": (slices((0, 10**9)), "layer_range is [0, 1000000000]; expected"),
    "slices of other lengths": (
        slices((0, 2)).replace("model: b, layer_range: [0, 2]", "model: b, layer_range: [0, 3]"),
        "slices[0].sources[1] takes 3 layers and slices[0].sources[0] 2",
    ),
    "layers that move": (
        slices((0, 2), (1, 4)),
        "slices[1].sources[0] takes layers 1 to 3 for the output's 2 to 4; layers stay in their places",
    ),
    "slices of other models": (
        slices((0, 2), (2, 4)).replace("model: b, layer_range: [2", "model: c, layer_range: [2"),
        "slices[1].sources[1] merges 'c', unlike slices[0]",
    ),
    "slices without base": (
        slices((0, 2)).replace("base_model: a", "base_model: x"),
        "c.yml:2: base_model is 'x', which no slice names; add it to the sources of each slice",
    ),
    "a base of the slice's own": (
        slices((0, 2)).replace("parameters: {}}", "base_model: b, parameters: {}}"),
        "slices[0].base_model differs from base_model of the whole merge",
    ),
    "an empty module": (
        "merge_method: linear\nmodules: {encoder: {}}",
        "modules.encoder must have either models or slices, got neither",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_refusals_name_the_line_and_the_key(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        read(text)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("c.yml:")


@pytest.mark.parametrize("name", [*METHODS, *NOT_HERE])
def test_every_method_is_read_or_refused_by_name(name: str) -> None:
    models = "[{model: a}]" if name in ("slerp", "nearswap") else "[{model: a}, {model: b}]"
    text = f"merge_method: {name}\nbase_model: base\nmodels: {models}\nparameters: {{weight: 1, t: 0.5}}"
    if name in NOT_HERE:
        with pytest.raises(RequestError, match=f"merge_method is {name}, which is mergekit's alone"):
            read(text)
    else:
        assert read(text).method == name


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="config"):
        load(tmp_path / "none.yml")
    (tmp_path / "big.yml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RequestError, match=f"big.yml has {MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read"):
        load(tmp_path / "big.yml")
    (tmp_path / "good.yml").write_text(linear("{weight: 1}"))
    assert load(tmp_path / "good.yml").where == str(tmp_path / "good.yml")


KEYS = [
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "tokenizer_source",
    "tokenizer",
    "modules",
]
INNER = ["model", "parameters", "layer_range", "sources", "weight", "density", "filter", "value", "lora", "path", "t"]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*METHODS, "a", "b", "base", "x+y", ""])
)
INSIDE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), INSIDE, max_size=6), st.sampled_from([*METHODS]))
def test_any_document_is_a_request_or_one_line(document: dict[str, Any], method: str) -> None:
    text = yaml.safe_dump({"merge_method": method, **document})
    try:
        found = loads(text.encode(), "c.yml")
    except HsaError as error:
        assert "\n" not in str(error)
    else:
        assert found.models
