"""Hooks read the same from models that are spread out, offloaded, compiled or quantised."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import CONFIGS, build
from support import MODELS
from transformers import AutoModelForCausalLM

from actpipe import HookedModel
from actpipe.errors import UnsupportedModelError
from actpipe.models.anatomy import find_anatomy
from actpipe.models.identities import check_identities, probe_ids
from actpipe.models.loading import ModelSource
from actpipe.models.recognition import family_for


def assert_same(found, expected):
    """Compare logits and every activation, those on request too, to the bit."""
    ids, names = probe_ids(expected), list(expected.hook_points)
    (logits, cache), (wanted_logits, wanted) = (model.run_with_cache(ids, names=names) for model in (found, expected))

    assert torch.equal(logits, wanted_logits)
    assert [name for name in names if not torch.equal(cache[name], wanted[name])] == []


def device_map(model, first_block):
    """Return where each part goes: the first block to `first_block`, the rest to the CPU."""
    paths = {module: path for path, module in model.native.named_modules()}
    first = paths[model.anatomy.blocks[0]]

    def place(path, module):
        if first == path:
            return {path: first_block}
        if not first.startswith(f"{path}.") and path:
            return {path: "cpu"}
        children = (place(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children())
        return {key: value for child in children for key, value in child.items()}

    own = {name: "cpu" for name, _ in model.native.named_buffers(recurse=False)}
    return own | place("", model.native)


class TestOffloaded:
    @pytest.mark.filterwarnings("ignore:The following device_map keys")  # tied and dropped modules have no place
    @pytest.mark.parametrize("name", CONFIGS)
    def test_one_block_on_disk(self, name, tmp_path):
        model = build(name)
        model.native.save_pretrained(tmp_path)
        native = type(model.native).from_pretrained(
            tmp_path, device_map=device_map(model, "disk"), offload_folder=tmp_path / "offloaded"
        )
        offloaded = HookedModel(native.eval(), ModelSource(name))

        assert {parameter.is_meta for parameter in native.parameters()} == {True, False}
        assert_same(offloaded, model)
        assert all(torch.equal(offloaded.weights[name], model.weights[name]) for name in model.weights.names())

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gpt_oss"])
    @pytest.mark.parametrize("where", ["cpu", "disk"])
    def test_every_module(self, name, where, tmp_path):
        import accelerate

        model = build(name)
        model.native.save_pretrained(tmp_path)
        if where == "cpu":
            native = AutoModelForCausalLM.from_pretrained(tmp_path)
            native = accelerate.cpu_offload(native, execution_device=torch.device("cpu"))
        else:
            native = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path)
        offloaded = HookedModel(native.eval(), ModelSource(name))

        assert all(parameter.is_meta for parameter in native.parameters())
        assert_same(offloaded, model)
        assert all(torch.equal(offloaded.weights[name], model.weights[name]) for name in model.weights.names())
        assert all(parameter.is_meta for parameter in native.parameters())

    def test_a_device_map_with_disk_may_be_given_when_loading(self):
        plain = HookedModel.from_pretrained(str(MODELS / "llama"), dtype="float32", device="cpu")
        places = device_map(plain, "disk")
        offloaded = HookedModel.from_pretrained(str(MODELS / "llama"), dtype="float32", device_map=places)

        assert_same(offloaded, plain)
        assert all(outcome.holds for outcome in check_identities(offloaded, probe_ids(plain)))

    @pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
    def test_what_exceeds_the_memory_that_is_allowed_waits_on_the_disk(self, name, tmp_path):
        model = build(name)
        n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.native.parameters())
        model.native.save_pretrained(tmp_path / "model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so much is offloaded
            spread = HookedModel.from_pretrained(
                str(tmp_path / "model"),
                device_map="auto",
                max_memory={"cpu": 2 * n_bytes // 3},
                offload_folder=tmp_path / "offloaded",
            )

        places = set(spread.native.hf_device_map.values())
        assert places == {"cpu", "disk"}
        assert_same(spread, model)


def compile_whole(native):
    return torch.compile(native, backend="aot_eager")


def compile_in_place(native):
    native.compile(backend="aot_eager")
    return native


def compile_forward(native):
    native.forward = torch.compile(native.forward, backend="aot_eager")
    return native


def compile_blocks(native):
    for block in find_anatomy(native, family_for(native.config)).blocks:
        block.compile(backend="aot_eager")
    return native


def replace_blocks(native):
    blocks = native.base_model.get_submodule(find_anatomy(native, family_for(native.config)).family.blocks)
    for layer, block in enumerate(list(blocks)):
        blocks[layer] = torch.compile(block, backend="aot_eager")
    return native


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize(
    "how", [compile_whole, compile_in_place, compile_forward, compile_blocks, replace_blocks], ids=lambda f: f.__name__
)
def test_hooks_of_a_compiled_model_are_called(name, how):
    torch.compiler.reset()
    ids = probe_ids(build(name))
    compiled = HookedModel(how(build(name).native), ModelSource(name))
    bare = compiled.forward(ids)

    assert_same(compiled, build(name))
    assert torch.equal(compiled.forward(ids), bare)
    assert [outcome for outcome in check_identities(compiled, ids) if not outcome.holds] == []


WIDE = {
    "gpt2": {"n_embd": 128, "n_inner": 256},
    "llama": {"hidden_size": 128, "intermediate_size": 256},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256},
    "bloom": {"hidden_size": 128},
}
"""Sizes that kernels for quantised weights take."""


class TestQuantised:
    @pytest.fixture(autouse=True)
    def _warnings_of_the_libraries(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def load(self, name, folder, settings, monkeypatch, dtype="float32"):
        """Return the quantised model, and what it was made of."""
        model_type, sizes = CONFIGS[name]
        monkeypatch.setitem(CONFIGS, name, (model_type, sizes | WIDE[name]))
        model = build(name)
        model.native.save_pretrained(folder)
        native = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", dtype=dtype
        )
        return HookedModel(native.eval(), ModelSource(name)), model

    def assert_as_the_bare_model(self, quantised, names):
        """Hooks change nothing, and what they show is what the quantised model computes."""
        ids = probe_ids(quantised)
        with torch.no_grad():
            bare = quantised.native(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits, cache = quantised.run_with_cache(ids, names=names)

        assert torch.equal(logits, bare.logits)
        for layer, expected in enumerate(bare.hidden_states[:-1]):
            assert torch.equal(cache[f"blocks.{layer}.hook_resid_pre"], expected)

    def assert_near(self, weights, plain, tolerance):
        assert weights.names() == plain.names()
        for name in plain.names():
            assert weights[name].shape == plain[name].shape
            torch.testing.assert_close(weights[name].float(), plain[name], atol=tolerance, rtol=0)

    @pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_torchao_int8_weights(self, name, dtype, tmp_path, monkeypatch):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        quantised, plain = self.load(name, tmp_path, settings, monkeypatch, dtype)

        self.assert_as_the_bare_model(quantised, list(quantised.hook_points))
        self.assert_near(quantised.weights, plain.weights, 5e-3)
        assert not torch.equal(quantised.weights.W_Q.float(), plain.weights.W_Q)
        assert [o for o in check_identities(quantised, probe_ids(plain)) if not o.holds] == []

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
    def test_bitsandbytes_eight_bits(self, name, tmp_path, monkeypatch):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        quantised, plain = self.load(name, tmp_path, BitsAndBytesConfig(load_in_8bit=True), monkeypatch)

        self.assert_as_the_bare_model(quantised, list(quantised.hook_points))
        self.assert_near(quantised.weights, plain.weights, 5e-3)
        assert [o for o in check_identities(quantised, probe_ids(plain)) if not o.holds] == []

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
    def test_bitsandbytes_four_bits(self, name, tmp_path, monkeypatch):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        quantised, plain = self.load(
            name, tmp_path, BitsAndBytesConfig(load_in_4bit=True), monkeypatch, dtype="bfloat16"
        )
        self.assert_near(quantised.weights, plain.weights, 0.2)

        self.assert_as_the_bare_model(quantised, None)
        weight = quantised.anatomy.part(0, quantised.anatomy.family.out).weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            with pytest.raises(UnsupportedModelError, match="repacked by bitsandbytes for this processor"):
                quantised.weights.W_O  # noqa: B018
            with pytest.raises(UnsupportedModelError, match="take weights, and `hook_result`, from the model"):
                quantised.run_with_cache([[1, 2, 3]], names=["blocks.0.attn.hook_result"])
        else:
            self.assert_near(quantised.weights, plain.weights, 0.2)

    def test_weights_in_a_form_that_is_not_known_are_refused(self):
        class Packed(torch.nn.Parameter):
            pass

        model = build("llama")
        projection = model.native.model.layers[0].mlp.up_proj
        projection.weight = Packed(projection.weight.data, requires_grad=False)

        with pytest.raises(UnsupportedModelError, match=r"cannot be read as plain numbers: .* Packed"):
            model.weights["blocks.0.mlp.W_in"]
        assert model.weights["blocks.1.mlp.W_in"].shape == (32, 48)
