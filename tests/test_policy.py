import copy
import errno
import json
import pickle

import numpy as np
import pytest

from asga.policy import LayerPolicy, Policy, bit_width

LAYERS = {
    "conv1": LayerPolicy(8, 8),
    "layer1.0.conv1": LayerPolicy(3, 4),
    "layer1.0.conv2": LayerPolicy(2, None),
    "fc": LayerPolicy(None, None),
}


@pytest.fixture
def policy() -> Policy:
    return Policy(LAYERS, meta={"architecture": "resnet20", "costs": {"bitops": 123}, "pair": (1, 2)})


def valid(**changes: object) -> dict[str, object]:
    layers = {"conv1": {"weight_bits": 3, "act_bits": 4}}
    return {"format": "asga.policy", "version": 1, "layers": layers, "meta": {}} | changes


class TestLayerPolicy:
    @pytest.mark.parametrize("bits", [2, 8, None])
    def test_accepts_supported_bits(self, bits):
        assert LayerPolicy(bits, 4).weight_bits == bits
        assert LayerPolicy(4, bits).act_bits == bits

    @pytest.mark.parametrize("bits", [1, 9, 0, -4])
    def test_refuses_bits_out_of_range(self, bits):
        with pytest.raises(ValueError, match=rf"weight_bits is {bits}; supported are 2 to 8"):
            LayerPolicy(bits, 4)

    @pytest.mark.parametrize("bits", [4.0, "4", True], ids=["float", "text", "bool"])
    def test_refuses_other_types(self, bits):
        with pytest.raises(TypeError, match=r"act_bits is .*; an integer from 2 to 8 is needed"):
            LayerPolicy(4, bits)

    @pytest.mark.parametrize(("given", "kept"), [("fp4", "fp4"), ("fp8", "fp8"), ("int4", 4), ("int2", 2), ("int8", 8)])
    def test_formats_of_weights_by_name(self, given, kept):
        assert LayerPolicy(given, 4).weight_bits == kept
        assert LayerPolicy(given, 4) == LayerPolicy(kept, 4)

    def test_numbers_of_numpy_become_those_of_python(self):
        layer = LayerPolicy(np.int64(3), np.uint8(4))
        assert (type(layer.weight_bits), type(layer.act_bits)) == (int, int)
        assert json.dumps(Policy({"fc": layer}).to_dict()["layers"]) == '{"fc": {"weight_bits": 3, "act_bits": 4}}'

    @pytest.mark.parametrize("name", ["fp6", "int9", "int1", "4", "FP8", ""])
    def test_refuses_unknown_names(self, name):
        with pytest.raises(ValueError, match=rf"weight_bits is '{name}'; supported are int2, .*, int8, fp4, fp8"):
            LayerPolicy(name, 4)

    def test_inputs_have_no_names(self):
        with pytest.raises(TypeError, match="act_bits is 'fp8'; an integer"):
            LayerPolicy(4, "fp8")


class TestMapping:
    def test_reads_by_name_in_order(self, policy):
        assert policy["layer1.0.conv1"].weight_bits == 3
        assert list(policy) == list(LAYERS)
        assert len(policy) == 4
        assert "conv1" in policy
        assert "bn1" not in policy

    def test_unknown_name_shows_the_nearest(self, policy):
        with pytest.raises(KeyError) as error:
            policy["layer1.0.conv3"]
        assert str(error.value).startswith("no layer 'layer1.0.conv3' in the policy; did you mean 'layer1.0.conv")
        assert policy.get("layer1.0.conv3") is None

    def test_cannot_be_changed(self, policy):
        with pytest.raises(TypeError):
            policy["conv1"] = LayerPolicy(2, 2)
        policy.meta["architecture"] = "other"
        assert policy.meta["architecture"] == "resnet20"

    def test_is_independent_of_what_it_was_made_from(self):
        layers, meta = dict(LAYERS), {"seeds": [0]}
        policy = Policy(layers, meta)
        layers.clear()
        meta["seeds"].append(1)
        assert policy == LAYERS
        assert policy.meta == {"seeds": [0]}

    def test_equality_is_about_bits_alone(self, policy):
        assert policy == Policy(dict(reversed(LAYERS.items())))
        assert policy != Policy(LAYERS | {"fc": LayerPolicy(8, 8)})

    def test_copies(self, policy):
        assert copy.deepcopy(policy) == policy
        assert pickle.loads(pickle.dumps(policy)) == policy

    def test_text_is_a_table(self, policy):
        assert str(policy).splitlines() == [
            "layer           weight    act",
            "conv1                8      8",
            "layer1.0.conv1       3      4",
            "layer1.0.conv2       2  float",
            "fc               float  float",
        ]
        assert repr(policy) == "Policy(4 layers: w8a8 w3a4 w2 float)"

    def test_refuses_what_is_no_policy(self):
        with pytest.raises(ValueError, match="at least one layer"):
            Policy({})
        with pytest.raises(TypeError, match="layer 'fc' is 4; a LayerPolicy is needed"):
            Policy({"fc": 4})
        with pytest.raises(TypeError, match="layer name 3 is not a string"):
            Policy({3: LayerPolicy(2, 2)})
        with pytest.raises(TypeError, match="meta cannot be kept as JSON"):
            Policy(LAYERS, {"model": object()})
        with pytest.raises(ValueError, match="meta cannot be kept as JSON"):
            Policy(LAYERS, {"loss": float("nan")})


class TestFile:
    def test_round_trip(self, policy, tmp_path):
        path = tmp_path / "policy.json"
        policy.save(path)
        loaded = Policy.load(path)
        assert loaded == policy
        assert list(loaded) == list(policy)
        assert loaded.meta == policy.meta

    def test_format(self, policy, tmp_path):
        policy.save(tmp_path / "policy.json")
        data = json.loads((tmp_path / "policy.json").read_text())
        assert (data["format"], data["version"]) == ("asga.policy", 1)
        assert data["layers"]["layer1.0.conv1"] == {"weight_bits": 3, "act_bits": 4}
        assert data["layers"]["fc"] == {"weight_bits": None, "act_bits": None}
        assert data["meta"]["costs"] == {"bitops": 123}

    def test_small_floats_are_of_version_2(self, tmp_path):
        policy = Policy(LAYERS | {"fc": LayerPolicy("fp4", None), "head": LayerPolicy("fp8", 8)})
        policy.save(tmp_path / "policy.json")
        data = json.loads((tmp_path / "policy.json").read_text())
        assert data["version"] == 2  # a reader of version 1 says that it is too old
        assert data["layers"]["fc"] == {"weight_bits": "fp4", "act_bits": None}
        assert Policy.load(tmp_path / "policy.json") == policy
        assert repr(policy).endswith("wfp4 wfp8a8)")
        assert str(policy).splitlines()[-1].split() == ["head", "fp8", "8"]

    def test_failed_save_keeps_the_old_file(self, policy, tmp_path, monkeypatch):
        path = tmp_path / "policy.json"
        policy.save(path)
        before = path.read_bytes()

        def fail(*args):
            raise OSError(errno.ENOSPC, "no space left on device")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            Policy({"other": LayerPolicy(2, 2)}).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no policy file at .*nowhere\.json"):
            Policy.load(tmp_path / "nowhere.json")

    def test_broken_json_gives_the_position(self, tmp_path):
        (tmp_path / "p.json").write_text('{\n  "format": "asga.policy",\n  "version" 1\n}')
        with pytest.raises(ValueError, match=r"p\.json: not valid JSON: line 3, column 13"):
            Policy.load(tmp_path / "p.json")

    def test_binary_file(self, tmp_path):
        (tmp_path / "p.json").write_bytes(b"\x80\x02\xff\xfe")
        with pytest.raises(ValueError, match=r"p\.json"):
            Policy.load(tmp_path / "p.json")

    def test_key_that_is_there_twice(self, tmp_path):
        entry = '{"weight_bits": 3, "act_bits": 4}'
        (tmp_path / "p.json").write_text(
            f'{{"format": "asga.policy", "version": 1, "layers": {{"fc": {entry}, "fc": {entry}}}}}'
        )
        with pytest.raises(ValueError, match="the key 'fc' is there twice"):
            Policy.load(tmp_path / "p.json")

    def test_newer_version_comes_before_what_else_is_unknown(self):
        data = valid(version=3, layers={"fc": {"weight_format": "fp4"}}, groups=[])
        with pytest.raises(ValueError, match=r"written by a newer asga .*; this one reads version <= 2"):
            Policy.from_dict(data)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([1, 2], "not a policy"),
            ({"layers": {}}, "not a policy"),
            (valid(format="asga.run"), "not a policy"),
            (valid(version="1"), "version is '1'; a positive integer is needed"),
            (valid(version=0), "version is 0; a positive integer is needed"),
            (valid(layers=[]), r"layers is \[\]; a JSON object is needed"),
            (valid(layers={}), "at least one layer"),
            (valid(layer={}), "the key 'layer' is not one of a policy; did you mean 'layers'"),
            (valid(Meta={}), "the key 'Meta' is not one of a policy; did you mean 'meta'"),
            (valid(note="x"), "the key 'note' is not one of a policy; those are format, version, layers, meta"),
            (valid(meta=3), "meta is 3; a JSON object is needed"),
            (valid(layers={"fc": 4}), "layer 'fc' is 4; an object with weight_bits and act_bits is needed"),
            (valid(layers={"fc": {"weight_bits": 4}}), "layer 'fc' is .* and act_bits is needed"),
            (
                valid(layers={"fc": {"weight_bits": 9, "act_bits": 4}}),
                "layer 'fc': weight_bits is 9; .* 2 to 8",
            ),
            (valid(layers={"fc": {"weight_bits": 4, "act_bits": 1}}), "layer 'fc': act_bits is 1; .* 2 to 8"),
            (
                valid(layers={"fc": {"weight_bits": 4.0, "act_bits": 4}}),
                "layer 'fc': weight_bits is 4.0; an int",
            ),
            (
                valid(layers={"fc": {"weight_bits": True, "act_bits": 4}}),
                "layer 'fc': weight_bits is True; an",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, data, message):
        with pytest.raises(ValueError, match=message):
            Policy.from_dict(data)


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (8, 8), ("fp4", 4), ("fp8", 8), (None, 32)])
def test_bit_width(bits, width):
    assert bit_width(bits) == width


class TestCheckAgainst:
    def test_fits(self, policy):
        policy.check_against([*reversed(LAYERS)])

    def test_unknown_layer_shows_the_nearest_names(self, policy):
        with pytest.raises(ValueError, match=r"'layer1\.0\.conv2'; did you mean 'layer1\.0\.conv1'"):
            policy.check_against(["conv1", "layer1.0.conv1", "fc"])

    @pytest.mark.parametrize("names", [("conv1", "layer1.0.conv1", "layer1.0.conv2"), ()], ids=["one", "all"])
    def test_second_names(self, policy, names):
        known = [*names, "first"] if names else [f"a.{name}" for name in LAYERS]
        second = {"fc": "first", "other": "conv1"} if names else {name: f"a.{name}" for name in LAYERS}
        with pytest.raises(ValueError, match=r"has second:\n(.*\n)*  'fc': the same layer as '(first|a\.fc)': use"):
            policy.check_against(known, second)

    def test_another_architecture(self, policy):
        with pytest.raises(ValueError, match=r"another architecture, resnet20: 3 of 4 layers .* not in"):
            policy.check_against(["conv1", "features.0", "features.3"])

    def test_layers_the_policy_does_not_mention(self, policy):
        with pytest.raises(ValueError, match=r"does not mention: 'head'\. To leave a layer float"):
            policy.check_against([*LAYERS, "head"])
