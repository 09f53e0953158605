import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.multitest import multipletests

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tables.pickles import read_table

SHARED = Path(
    os.environ.get("LM_EVAL_BH_SHARED", Path(__file__).resolve().parents[3].parent / "shared")
)
OLMOE = SHARED / "olmoe_kde"
needs_olmoe = pytest.mark.skipif(
    not OLMOE.is_dir(), reason=f"no OLMoE tables in {OLMOE}; set LM_EVAL_BH_SHARED to their parent"
)
X, CDF = np.linspace(-2, 2, 50), np.linspace(0, 1, 50)


def write(folder, *tables, protocol=4):
    folder.mkdir(exist_ok=True)
    for layer, table in enumerate(tables):
        path = folder / f"distribution_model_layer_{layer}.pkl"
        path.write_bytes(pickle.dumps(table, protocol=protocol))
    return folder


class Call:
    """Pickles as a call of any function: what an attacker would write."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def olmoe():
    return NullModel.from_pickles(OLMOE, model="allenai/OLMoE-1B-7B-0924")


@needs_olmoe
def test_olmoe_tables(olmoe):
    assert olmoe.num_layers == 16
    assert olmoe.header.points == 10_000
    assert olmoe.header.model == "allenai/OLMoE-1B-7B-0924"
    assert olmoe.header.num_experts is None
    assert olmoe.header.fingerprint is None
    for layer in range(16):
        with (OLMOE / f"distribution_model_layer_{layer}.pkl").open("rb") as file:
            table = pickle.load(file)  # trusted: it is part of the test data
        x, cdf = olmoe.cdf(layer)
        np.testing.assert_array_equal(x, table["x"])
        np.testing.assert_array_equal(cdf, table["cdf"])


@needs_olmoe
def test_olmoe_quantiles(olmoe):
    """The 0.999 quantiles that the tables' README states."""
    assert olmoe.thresholds(0, np.array([0.001]))[0] == pytest.approx(2.39, abs=0.005)
    assert olmoe.thresholds(10, np.array([0.001]))[0] == pytest.approx(3.89, abs=0.005)


@needs_olmoe
@pytest.mark.parametrize("layer", [0, 7, 15])
def test_olmoe_level_under_the_global_null(olmoe, layer):
    """Independent logits from the table itself: at level 0.4, 60 % of the tokens reject nothing."""
    rng = np.random.default_rng(layer)
    x, cdf = olmoe.cdf(layer)
    kept = np.concatenate([[True], np.diff(cdf) > 0])
    logits = np.interp(rng.random((2000, 64)), cdf[kept], x[kept])
    p = olmoe.p_values(layer, torch.from_numpy(logits)).numpy()
    rejects = np.array([multipletests(row, 0.4, method="fdr_bh")[0].any() for row in p])
    assert (~rejects).mean() == pytest.approx(0.6, abs=4 * np.sqrt(0.6 * 0.4 / 2000))
    # the thresholds come to the same decisions
    limits = olmoe.thresholds(layer, np.arange(1, 65) * 0.4 / 64)
    assert ((-np.sort(-logits, axis=1) >= limits).any(1) == rejects).all()


@needs_olmoe
def test_olmoe_round_trip(olmoe, tmp_path):
    olmoe.save(tmp_path / "olmoe.safetensors")
    again = NullModel.load(tmp_path / "olmoe.safetensors")
    assert again.header == olmoe.header
    for layer in range(16):
        for one, two in zip(olmoe.cdf(layer), again.cdf(layer), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f8"])
def test_protocols_and_dtypes(tmp_path, protocol, dtype):
    x, cdf = X.astype(dtype), CDF.astype(dtype)
    write(tmp_path, {"x": x, "cdf": cdf, "bandwidth": np.float64(0.1)}, protocol=protocol)
    null = NullModel.from_pickles(tmp_path)
    for ours, theirs in zip(null.cdf(0), (x, cdf), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_array_equal(ours, theirs)


def test_old_and_new_numpy_module_names(tmp_path):
    for names in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        data = pickle.dumps({"x": X, "cdf": CDF}, protocol=3)  # names end in a newline, unframed
        path = tmp_path / "table.pkl"
        path.write_bytes(data.replace(*names))
        np.testing.assert_array_equal(read_table(path)[0], X)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_is_refused_and_not_executed(tmp_path, protocol, nested):
    marker = tmp_path / "executed"
    attack = Call(os.system, f"touch {marker}")
    table = {"x": X, "cdf": CDF, "more": [attack]} if nested else attack
    folder = write(tmp_path / "tables", table, protocol=protocol)
    # in old protocols bytes, and so arrays, go through _codecs.encode, which comes first
    match = r"_codecs\.encode" if protocol < 3 and nested else r"(posix|nt)\.system"
    with pytest.raises(NullModelError, match=match):
        NullModel.from_pickles(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        Call(eval, "1"),
        Call(np.load, "x.npy"),
        Call(np.frombuffer, b"12345678", "f8"),
        Call(getattr, np.ndarray, "tofile"),
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"P1\n.",  # a persistent id
    ],
)
def test_every_other_name_is_refused(tmp_path, attack):
    path = tmp_path / "table.pkl"
    path.write_bytes(attack if isinstance(attack, bytes) else pickle.dumps(attack))
    with pytest.raises(NullModelError, match=r"could not be read: .* source you trust\.$"):
        read_table(path)


def test_no_numpy_object_is_within_reach(tmp_path):
    """Names that are allowed resolve to inert stand-ins: no object arrays, no memory of others."""
    attack = Call(np.ndarray, (1,), np.dtype(object), b"\x41" * 8)
    path = tmp_path / "table.pkl"
    path.write_bytes(pickle.dumps({"x": attack, "cdf": attack}))
    with pytest.raises(NullModelError, match="array without data"):
        read_table(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([X, CDF], "not a dictionary with the arrays"),
        ({"x": X}, "not a dictionary with the arrays"),
        ({"x": list(X), "cdf": list(CDF)}, "not a dictionary with the arrays"),
        ({"x": X, "cdf": np.float64(1)}, "array without data"),
        ({"x": X.astype(object), "cdf": CDF}, "array without data"),
        ({"x": X.astype(int), "cdf": CDF}, "'i8' where floats are expected"),
        ({"x": X.reshape(5, 10), "cdf": CDF}, "one dimension"),
        ({"x": X, "cdf": CDF[:-1]}, r"shapes \(50,\) and \(49,\)"),
        ({"x": X[:1], "cdf": CDF[:1]}, "2 or more points"),
        ({"x": X[::-1].copy(), "cdf": CDF}, "not strictly ascending"),
        ({"x": X.round(), "cdf": CDF}, "not strictly ascending"),
        ({"x": X, "cdf": CDF[::-1].copy()}, r"does not rise within \[0, 1\]"),
        ({"x": X, "cdf": CDF * 1.1}, r"does not rise within \[0, 1\]"),
        ({"x": X, "cdf": CDF - 0.1}, r"does not rise within \[0, 1\]"),
        ({"x": X, "cdf": np.where(CDF > 0.5, np.nan, CDF)}, "not finite"),
        ({"x": X * (np.finfo(float).max / 2), "cdf": CDF}, "too wide"),
    ],
)
def test_unfit_tables(tmp_path, table, message):
    write(tmp_path, {"x": X, "cdf": CDF}, table)
    with pytest.raises(NullModelError, match=message) as caught:
        NullModel.from_pickles(tmp_path)
    assert "distribution_model_layer_1.pkl" in str(caught.value)


def test_damaged_files(tmp_path):
    path = tmp_path / "table.pkl"
    data = pickle.dumps({"x": X, "cdf": CDF}, protocol=4)
    for length in [*range(0, 200, 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(NullModelError, match=r"table\.pkl could not be read"):
            read_table(path)
    path.write_text("x,cdf\n0,0\n1,1\n")
    with pytest.raises(NullModelError, match=r"table\.pkl could not be read"):
        read_table(path)


def test_unfit_folders(tmp_path):
    with pytest.raises(NullModelError, match="There is no folder"):
        NullModel.from_pickles(tmp_path / "missing")
    with pytest.raises(NullModelError, match="holds no distribution_model_layer_<i>"):
        NullModel.from_pickles(tmp_path)
    write(tmp_path, *[{"x": X, "cdf": CDF}] * 3)
    (tmp_path / "distribution_model_layer_1.pkl").unlink()
    with pytest.raises(NullModelError, match="a table for layer 2 but none for layer 1"):
        NullModel.from_pickles(tmp_path)
    with pytest.raises(NullModelError, match="is missing"):
        read_table(tmp_path / "distribution_model_layer_1.pkl")


def test_header_fields(tmp_path):
    write(tmp_path, {"x": X, "cdf": CDF}, {"x": X[::2].copy(), "cdf": CDF[::2].copy()})
    header = NullModel.from_pickles(tmp_path, model="a/b", num_experts=64).header
    assert (header.model, header.num_experts, header.num_layers) == ("a/b", 64, 2)
    assert header.points is None  # the layers differ
    with pytest.raises(ParameterError, match="did you mean 'model'"):
        NullModel.from_pickles(tmp_path, modell="a/b")
    with pytest.raises(ParameterError, match="num_experts='64'"):
        NullModel.from_pickles(tmp_path, num_experts="64")
    with pytest.raises(NullModelError, match="1 bandwidths for 2 layers"):
        NullModel.from_pickles(tmp_path, bandwidth=[0.1])
