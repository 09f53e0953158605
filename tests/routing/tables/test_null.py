import json
import re
import signal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.resources import shipped
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.kde import bandwidth_of, fit_cdf
from lm_eval_bh.routing.tables.null_match import check_routers
from lm_eval_bh.routing.tables.null_model import NullHeader, NullModel
from lm_eval_bh.routing.tables.thresholds import _from_ordered, _ordered

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
shares = st.floats(0, 1)


def logits(layers=2, tokens=40, experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(tokens, experts, generator=generator) * (layer + 1)
        for layer in range(layers)
    }


def model_of(x, cdf):
    table = np.array(x, dtype=np.float64), np.array(cdf, dtype=np.float64)
    return NullModel((table,), NullHeader(num_layers=1))


def p_at(null, z):
    return null.p_values(0, torch.tensor(z, dtype=torch.float64)).item()


def with_neighbours(z):
    """Return z, the floats above and below, all finite and sorted."""
    with np.errstate(over="ignore"):
        z = np.concatenate([z, np.nextafter(z, np.inf), np.nextafter(z, -np.inf)])
    return np.sort(z[np.isfinite(z)])


@st.composite
def tables(draw):
    """Draw a grid and a CDF with flat pieces, jumps between neighbouring floats, and any scale."""
    scale = draw(st.sampled_from([1e-300, 1e-3, 1.0, 8.0, 1e300]))
    knots = draw(st.lists(st.floats(-4, 4), min_size=2, max_size=12))
    x = np.unique(np.array(knots) * scale + 0.0)
    if draw(st.booleans()):
        x = np.unique(np.concatenate([x, np.nextafter(x, np.inf)]))
    if len(x) < 2:
        x = np.array([x[0], np.nextafter(x[0], np.inf)])
    level = st.one_of(shares, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    cdf = np.sort(draw(st.lists(level, min_size=len(x), max_size=len(x))))
    return x, cdf


class TestPValues:
    def test_known_values(self):
        null = model_of([0, 1, 3], [0.1, 0.5, 0.9])
        z = torch.tensor([[-torch.inf, -1, 0, 0.5], [1, 2, 3, torch.inf]])
        expected = torch.tensor([[0.9, 0.9, 0.9, 0.7], [0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
        torch.testing.assert_close(null.p_values(0, z), expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 8), (2, 3, 8)])
    def test_shape_and_dtype(self, dtype, shape):
        null = NullModel.fit(logits())
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        p = null.p_values(1, z)
        assert p.dtype == torch.float64
        assert p.shape == shape
        x, cdf = null.cdf(1)
        np.testing.assert_allclose(p, 1 - np.interp(z.double(), x, cdf), rtol=0, atol=1e-12)

    def test_small_p_values_survive_bfloat16(self):
        """In bfloat16 itself 1 - F(z) would be 0 or at least 0.0039 here."""
        null = NullModel.fit({0: torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))})
        assert 0 < null.p_values(0, torch.tensor([3.5], dtype=torch.bfloat16)).item() < 1e-3

    def test_transposed_logits_and_nan(self):
        null = NullModel.fit(logits())
        z = logits()[0].T
        assert torch.equal(null.p_values(0, z), null.p_values(0, z.contiguous()))
        z = torch.tensor([0.0, torch.nan])
        assert null.p_values(0, z).isnan().tolist() == [False, True]

    def test_no_gradient_is_recorded(self):
        assert not NullModel.fit(logits()).p_values(0, logits()[0].requires_grad_()).requires_grad

    @pytest.mark.parametrize("layer", [-1, 2, "0", 0.0, True, None])
    def test_layer_out_of_range(self, layer):
        null = NullModel.fit(logits())
        for use in (
            lambda: null.p_values(layer, torch.zeros(1)),
            lambda: null.cdf(layer),
            lambda: null.thresholds(layer, np.zeros(1)),
        ):
            with pytest.raises(ParameterError, match=r"layers 0 to 1"):
                use()

    @settings(max_examples=100, deadline=None)
    @given(tables(), st.lists(finite, min_size=2, max_size=20))
    def test_monotone_in_floating_point(self, table, extra):
        x, _ = table
        z = with_neighbours(np.concatenate([x, extra, x[1:] / 2 + x[:-1] / 2]))
        p = model_of(*table).p_values(0, torch.from_numpy(z)).numpy()
        assert (np.diff(p) <= 0).all()
        assert ((p >= 0) & (p <= 1)).all()


class TestThresholds:
    @settings(max_examples=100, deadline=None)
    @given(tables(), st.lists(shares, max_size=6), st.lists(finite, max_size=6), st.data())
    @example(([0.0, 1.0], [0.0, 1.0]), [0.00625, 0.4], [], None)
    @example(([0.0, 1.0, 2.0], [0.5, 0.5, 0.5]), [0.5, 0.4], [], None)
    def test_same_decisions_as_p_values(self, table, levels, extra, data):
        """For every z: z >= threshold if and only if p(z) <= c, exactly."""
        null = model_of(*table)
        x = np.array(table[0])
        at_knots = null.p_values(0, torch.from_numpy(x)).numpy()
        c = np.concatenate([levels, at_knots, np.nextafter(at_knots, 1), np.nextafter(at_knots, 0)])
        t = null.thresholds(0, c)
        assert t.shape == c.shape
        assert t.dtype == np.float64
        inside = np.concatenate([x[:-1] / 2 + x[1:] / 2, extra])
        if data is not None:
            inside = np.append(inside, data.draw(st.floats(x[0], x[-1])))
        ends = np.array([np.finfo(float).min, np.finfo(float).max])
        z = with_neighbours(np.concatenate([t[np.isfinite(t)], x, inside, ends]))
        p = null.p_values(0, torch.from_numpy(z)).numpy()
        np.testing.assert_array_equal(z[:, None] >= t[None, :], p[:, None] <= c[None, :])

    def test_ends(self):
        null = model_of([0, 1], [0.1, 0.9])
        low, high = p_at(null, -1.0), p_at(null, 2.0)
        levels = [-1, 0, np.nextafter(high, 0), high, low, 1, 2, np.inf]
        t = null.thresholds(0, np.array(levels))
        assert t.tolist() == [np.inf] * 3 + [1.0] + [-np.inf] * 4

    def test_random_logits_of_a_fitted_model(self):
        null = NullModel.fit(logits(tokens=400, experts=64))
        z = logits(tokens=400, experts=64, seed=7)[1].double()
        c = np.arange(1, 65) * 0.4 / 64
        t = torch.from_numpy(null.thresholds(1, c))
        p = null.p_values(1, z)
        assert torch.equal(z[..., None] >= t, p[..., None] <= torch.from_numpy(c))

    @pytest.mark.parametrize("levels", [np.array([0.1, np.nan]), np.array(0.1), np.ones((2, 2))])
    def test_unfit_levels(self, levels):
        with pytest.raises(ParameterError, match="critical_values"):
            NullModel.fit(logits()).thresholds(0, levels)

    @given(st.lists(finite, min_size=1))
    def test_order_of_floats_as_integers(self, values):
        array = np.array(values)
        order = _ordered(array)
        np.testing.assert_array_equal(_from_ordered(order), array)
        with np.errstate(over="ignore"):
            next_up = np.nextafter(array, np.inf)
        np.testing.assert_array_equal(_ordered(next_up), order + 1)


class TestFit:
    def test_pools_tokens_and_experts(self):
        data = logits()
        null = NullModel.fit(data, kernel="epanechnikov", bandwidth=0.5, points=500)
        for layer, values in data.items():
            expected = fit_cdf(values.double().numpy(), "epanechnikov", 0.5, 500)
            for ours, theirs in zip(null.cdf(layer), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        header = null.header
        assert (header.num_layers, header.num_experts, header.tokens) == (2, 8, 40)
        assert (header.kernel, header.bandwidth, header.points) == ("epanechnikov", [0.5] * 2, 500)
        assert (header.trim, header.format_version, header.model) == (0, 1, None)
        assert {"torch", "numpy", "scipy", "transformers"} <= set(header.versions)

    def test_scott_bandwidth_in_the_header(self):
        null = NullModel.fit(logits())
        widths = [bandwidth_of(values.double().numpy().ravel()) for values in logits().values()]
        assert null.header.bandwidth == widths

    @pytest.mark.parametrize("trim", [0, 1, 3])
    def test_trim_leaves_out_extremes_of_each_token(self, trim):
        data = logits(layers=1, tokens=30, experts=8)
        kept = np.array([sorted(row)[trim : 8 - trim] for row in data[0].double().tolist()])
        x, cdf = NullModel.fit(data, trim=trim).cdf(0)
        expected_x, expected_cdf = fit_cdf(kept)
        np.testing.assert_allclose(x, expected_x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(cdf, expected_cdf, rtol=0, atol=1e-12)

    def test_tensors_and_arrays_alike(self):
        data = {layer: values.bfloat16() for layer, values in logits().items()}
        arrays = {layer: values.double().numpy() for layer, values in data.items()}
        one, two = NullModel.fit(data), NullModel.fit(arrays)
        assert one.header == two.header
        np.testing.assert_array_equal(one.cdf(1), two.cdf(1))

    def test_extra_header_fields(self):
        extra = {"model": "a/b", "revision": "c0ffee", "text": "words", "versions": {"mine": "1"}}
        header = NullModel.fit(logits(), header=extra).header
        assert (header.model, header.revision, header.text) == ("a/b", "c0ffee", "words")
        assert header.versions["mine"] == "1"
        assert "numpy" in header.versions

    def test_tables_cannot_be_changed(self):
        x = np.array([0.0, 1.0])
        null = NullModel(((x, np.array([0.0, 1.0])),), NullHeader(num_layers=1))
        with pytest.raises(ValueError, match="read-only"):
            null.cdf(0)[0][0] = 5
        x[0] = -1  # the caller's own array stays the caller's
        assert null.cdf(0)[0][0] == 0

    @pytest.mark.parametrize(
        ("data", "parameters", "message"),
        [
            (logits(), {"trim": 4}, "from 0 to 3 with 8 experts"),
            (logits(), {"trim": -1}, "found -1"),
            (logits(), {"trim": 1.0}, "found 1.0"),
            (logits(), {"kernel": "cosine"}, "kernel='cosine'"),
            (logits(), {"bandwidth": -1}, "bandwidth=-1"),
            (logits(), {"points": 0}, "points=0"),
            (logits(), {"header": {"modle": "a"}}, "did you mean 'model'"),
            (logits(), {"header": {"tokens": 3}}, "no field 'tokens' to set"),
            (logits(), {"header": {"model": 3}}, "cannot hold model=3"),
            ({}, {}, r"found \[\]"),
            ({1: logits()[0]}, {}, r"found \[1\]"),
            ({0: torch.randn(3)}, {}, r"layer 0 have shape \(3,\)"),
            ({0: torch.randn(3, 4), 1: torch.randn(3, 5)}, {}, r"found \[4, 5\]"),
        ],
    )
    def test_bad_parameters(self, data, parameters, message):
        with pytest.raises(ParameterError, match=message):
            NullModel.fit(data, **parameters)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("trim", [0, 2])
    def test_not_finite_logits_name_the_layer(self, bad, trim):
        data = logits()
        data[1][3, 2] = bad
        with pytest.raises(NullModelError, match=r"layer 1 .*: 1 of 320 samples are NaN or inf"):
            NullModel.fit(data, trim=trim)

    @pytest.mark.parametrize("values", [torch.zeros(4, 8), torch.zeros(0, 8), torch.ones(1, 1)])
    def test_logits_without_a_distribution(self, values):
        with pytest.raises(NullModelError, match="layer 0 cannot be fitted"):
            NullModel.fit({0: values})

    def test_tables_that_are_none(self):
        with pytest.raises(NullModelError, match="not strictly ascending"):
            model_of([0, 0], [0, 1])
        with pytest.raises(NullModelError, match="2 layers cannot have 0 tables"):
            NullModel((), NullHeader(num_layers=2))


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "null.safetensors"
        NullModel.fit(logits(), points=64, header={"model": "a/b"}).save(path)
        return path

    @settings(max_examples=50, deadline=None)
    @given(
        layers=st.lists(tables(), min_size=1, max_size=4),
        texts=st.lists(st.one_of(st.none(), st.text()), min_size=5, max_size=5),
        counts=st.lists(st.one_of(st.none(), st.integers(1, 10**9)), min_size=3, max_size=3),
        width=st.one_of(st.none(), st.floats(1e-9, 1e9)),
        versions=st.dictionaries(st.text(), st.text(), max_size=3),
    )
    def test_round_trip(self, tmp_path_factory, layers, texts, counts, width, versions):
        header = NullHeader(
            num_layers=len(layers),
            **dict(zip(("model", "revision", "fingerprint", "text", "kernel"), texts, strict=True)),
            **dict(zip(("num_experts", "tokens", "trim"), counts, strict=True)),
            bandwidth=width and [width] * len(layers),
            versions=versions,
        )
        null = NullModel(tuple(layers), header)
        path = tmp_path_factory.mktemp("null") / "deeper" / "null.safetensors"
        null.save(path)
        if any(cdf[0] == cdf[-1] for _, cdf in layers):
            with pytest.raises(NullModelError, match="never rises"):
                NullModel.load(path)
            return
        again = NullModel.load(path)
        assert again.header == header
        assert again.num_layers == null.num_layers
        for layer in range(null.num_layers):
            np.testing.assert_array_equal(again.cdf(layer), null.cdf(layer))

    def test_every_truncation_is_refused(self, path):
        data = path.read_bytes()
        for length in [*range(0, 40), *range(40, len(data), 97), len(data) - 8, len(data) - 1]:
            path.write_bytes(data[:length])
            with pytest.raises(NullModelError, match=r"could not be read: .*copy it again"):
                NullModel.load(path)

    def test_foreign_files(self, path, tmp_path):
        with pytest.raises(NullModelError, match="There is no null model"):
            NullModel.load(tmp_path / "missing")
        with pytest.raises(NullModelError, match="import pickles with"):
            NullModel.load(tmp_path)
        path.write_text("x,cdf\n0,0\n")
        with pytest.raises(NullModelError, match="could not be read"):
            NullModel.load(path)
        for metadata in (None, {"format": "pt"}):
            save_file({"weight": np.zeros(3)}, path, metadata=metadata)
            with pytest.raises(NullModelError, match="not a null model; give one"):
                NullModel.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 2}, r"version 2, but .* only up to 1; upgrade lm-eval-bh\.$"),
            ({"format_version": None}, "no format version"),
            ({"format_version": "1"}, "no format version"),
            ({"num_layers": 3}, "3 bandwidths|2 bandwidths for 3 layers"),
            ({"num_layers": 3, "bandwidth": None}, "3 layers, but it has 4 arrays"),
            ({"num_layers": 0}, "num_layers='0'"),
            ({"num_layers": True}, "num_layers='True'"),
            ({"bandwidth": [0.1, "x"]}, "bandwidth="),
            ({"bandwidth": [0.1, float("nan")]}, "bandwidth="),
            ({"versions": None}, "versions='None'"),
            ({"points": 65}, "64 points, but the header says 65"),
            ({"surprise": 1}, "surprise='1'"),
        ],
    )
    def test_inconsistent_headers(self, path, change, message):
        self.rewrite(path, change)
        with pytest.raises(NullModelError, match=message) as caught:
            NullModel.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 10**5, '{"format_version": 1}'])
    def test_damaged_headers(self, path, text):
        save_file({"a": np.zeros(1)}, path, metadata={"lm_eval_bh_null": text})
        with pytest.raises(NullModelError, match="its header"):
            NullModel.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layer.1.cdf": None}, "3 arrays"),
            ({"layer.1.cdf": None, "layer.2.x": np.zeros(64)}, r"layer\.1\.cdf"),
            ({"layer.1.cdf": np.zeros(63)}, "shapes"),
            ({"layer.1.cdf": np.zeros(64, np.float32)}, "not float64"),
            ({"layer.1.x": np.zeros(64)}, "layer 1 is not a CDF: x is not strictly ascending"),
            ({"layer.1.x": np.full(64, np.nan)}, "not finite"),
            ({"layer.1.cdf": np.full(64, 1.5)}, "does not rise within"),
        ],
    )
    def test_inconsistent_arrays(self, path, change, message):
        self.rewrite(path, {}, change)
        with pytest.raises(NullModelError, match=message) as caught:
            NullModel.load(path)
        assert str(path) in str(caught.value)

    @staticmethod
    def rewrite(path, header, arrays=None):
        null = NullModel.load(path)
        fields = json.loads(null.header.to_json()) | header
        tensors = {}
        for layer in range(null.num_layers):
            x, cdf = null.cdf(layer)
            tensors |= {f"layer.{layer}.x": x, f"layer.{layer}.cdf": cdf}
        tensors |= arrays or {}
        kept = {name: values for name, values in tensors.items() if values is not None}
        save_file(kept, path, metadata={"lm_eval_bh_null": json.dumps(fields)})

    def test_a_failing_save_leaves_the_old_file(self, path):
        """The limit on file sizes stops the writing in the middle, as a full disk would."""
        resource = pytest.importorskip("resource")  # not on Windows
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(NullModelError, match="cannot be written"):
                NullModel.fit(logits(seed=5), points=4096).save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_saving_below_a_file(self, path):
        with pytest.raises(NullModelError, match="cannot be written"):
            NullModel.load(path).save(path / "below.safetensors")


class TestFingerprint:
    WEIGHTS = tuple(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)))

    def test_same_in_every_dtype_that_holds_bfloat16(self):
        stored = [weight.bfloat16() for weight in self.WEIGHTS]
        expected = router_fingerprint(stored)
        assert len(expected) == 64
        assert router_fingerprint(w.float() for w in stored) == expected
        assert router_fingerprint(w.double() for w in stored) == expected
        assert router_fingerprint(self.WEIGHTS) == expected  # rounded on loading, or here
        strided = [torch.nn.Parameter(weight.T.contiguous().T) for weight in stored]
        assert router_fingerprint(strided) == expected

    def test_depends_on_values_order_and_shape(self):
        changed = [w.clone() for w in self.WEIGHTS]
        changed[2][0, 0] += 1
        variants = [
            self.WEIGHTS,
            changed,
            self.WEIGHTS[::-1],
            self.WEIGHTS[:2],
            [w.reshape(16, 8) for w in self.WEIGHTS],
        ]
        assert len({router_fingerprint(weights) for weights in variants}) == len(variants)

    def test_unfit_weights(self):
        with pytest.raises(NullModelError, match="no router weights"):
            router_fingerprint([])
        with pytest.raises(NullModelError, match="router 1 are not in memory"):
            router_fingerprint([self.WEIGHTS[0], torch.empty(8, 16, device="meta")])


class TestCheck:
    NULL = NullModel.fit(logits(), points=64, header={"model": "a/one", "fingerprint": "f" * 64})

    def test_same_router(self):
        check_routers(self.NULL.header, "f" * 64, 2, 8, "a/one")
        check_routers(self.NULL.header, None, 2, None, "a/one")

    @pytest.mark.parametrize(
        ("router", "message"),
        [
            (("e" * 64, 2, 8), "fingerprint: f+ there and e+ here"),
            (("f" * 64, 3, 8), "layers: 2 there and 3 here"),
            (("f" * 64, 2, 64), "experts: 8 there and 64 here"),
        ],
    )
    def test_another_router(self, router, message):
        with pytest.raises(NullModelError, match=message) as caught:
            check_routers(self.NULL.header, *router, "b/two")
        assert "a/one" in str(caught.value)
        assert "b/two" in str(caught.value)

    def test_imported_tables_know_little(self):
        null = model_of([0, 1], [0, 1])
        check_routers(null.header, "e" * 64, 1, 64, "b/two")
        with pytest.raises(NullModelError, match=r"an unnamed model.*b/two"):
            check_routers(null.header, "e" * 64, 2, 64, "b/two")


class TestDegenerate:
    """A null model that would select all experts or none is refused or warned about on loading."""

    X = np.linspace(-1.0, 1.0, 5)

    @pytest.fixture
    def saved(self, tmp_path):
        def save(x, cdf, **header):
            path = tmp_path / "null.safetensors"
            NullModel(((x, cdf),), NullHeader(num_layers=1, **header)).save(path)
            return path

        return save

    @pytest.mark.parametrize(
        ("level", "effect"),
        [(0.0, "p-value would be 1, and tests would select none"), (1.0, "0, .* all experts")],
    )
    def test_a_cdf_that_never_rises_is_refused(self, saved, level, effect):
        with pytest.raises(NullModelError, match=f"layer 0 never rises: every .*{effect}"):
            NullModel.load(saved(self.X, np.full(5, level)))

    def test_one_flat_expert_of_many_is_refused(self, saved):
        cdf = np.stack([np.linspace(0, 1, 5), np.zeros(5)])
        with pytest.raises(NullModelError, match="never rises"):
            NullModel.load(saved(np.stack([self.X] * 2), cdf, null_scope="expert"))

    @pytest.mark.parametrize(
        ("x", "cdf", "header", "warning"),
        [
            (X, np.linspace(0.0, 0.2, 5), {}, "only p-values from 0.8 to 1, .* hardly any expert"),
            (X, np.linspace(0.8, 1.0, 5), {}, "only p-values from 0 to 0.2, .* nearly all expert"),
            (1 + X * 1e-12, np.linspace(0, 1, 5), {}, "2e-12 wide"),
            (X, np.linspace(0, 1, 5), {"tokens": 1}, "was fitted to 1 token, which is too few"),
        ],
    )
    def test_what_is_unlikely_to_serve_is_warned_of(self, saved, caplog, x, cdf, header, warning):
        NullModel.load(saved(x, cdf, **header))
        (record,) = caplog.records
        assert re.search(warning, record.getMessage())
        assert record.getMessage().endswith("calibrate one on more text.")

    def test_what_ships_is_above_doubt(self, caplog):
        for path in shipped("kde_models").glob("*.safetensors"):
            NullModel.load(path)
        assert not caplog.records


def test_a_file_without_a_checksum_is_read_as_before(tmp_path):
    null = NullModel.fit({0: np.random.default_rng(0).normal(size=(64, 8))})
    tensors = {"layer.0.x": null.tables[0][0], "layer.0.cdf": null.tables[0][1]}
    save_file(tensors, tmp_path / "null", metadata={"lm_eval_bh_null": null.header.to_json()})
    assert NullModel.load(tmp_path / "null").digest() == null.digest()
