import json

import asga


def test_text(run):
    status, out, err = run("info")
    assert (status, err) == (0, "")
    assert asga.__version__ in out
    assert "fake_quant" in out


def test_json(run):
    status, out, err = run("info", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["versions"]["asga"] == asga.__version__
