"""Record what TransformerLens 2.16's own methods give for the tiny models beside this folder.

README.md beside it says how it is run, in an environment of its own; it imports nothing of actpipe. Each tiny model is
built by TransformerLens' own conversion of the native weights and must first give the recorded activations (`tl2.npz`,
or the native logits where there are none). Every call is then written down: method, arguments and labels in
`calls.json`, values under the same key in `FAMILY.npz`.
"""

from __future__ import annotations

import ast
import json
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformer_lens.loading_from_pretrained as loading
from transformer_lens import HookedEncoder, HookedEncoderDecoder, HookedTransformer, SVDInterpreter, evals, utils
from transformer_lens.head_detector import HEAD_NAMES, detect_head
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForPreTraining,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent
MODELS = HERE.parent / "data"
INDUCTION = HERE.parents[2] / "workflows" / "data" / "induction-2l"
FAMILIES = ("gpt2", "llama", "gemma2", "qwen3", "bloom", "phi")
OF_WEIGHTS_ONLY = ("gpt_neo", "gptj", "opt", "phi3")
PROCESSING = {
    "native": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False),
    "folded": {
        "fold_ln": True,
        **dict.fromkeys(("center_writing_weights", "center_unembed", "fold_value_biases"), False),
    },
    "processed": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True),
}
SOME_POSITIONS = "[0, 5, 11]"


class Recording:
    """Calls and their values, by key."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.values: dict[str, np.ndarray] = {}

    def add(self, method: str, function: Callable[[], Any], **arguments: Any) -> None:
        """Call, and keep the values, the labels beside them, or the kind of error."""
        key = f"{method}/{sum(name.startswith(f'{method}/') for name in self.calls)}"
        self.calls[key] = {"method": method, "arguments": arguments}
        try:
            found = function()
        except (KeyError, RuntimeError, AssertionError, ValueError, AttributeError, IndexError) as error:
            self.calls[key]["error"] = type(error).__name__
            return
        if isinstance(found, tuple):
            found, labels = found
            self.calls[key]["labels"] = [str(label) for label in labels]
        array = torch.as_tensor(found).detach().numpy()
        self.values[key] = array.astype(np.complex64 if np.iscomplexobj(array) else np.float32)

    def write(self, name: str) -> dict[str, Any]:
        """Write the values, and return the calls."""
        np.savez_compressed(HERE / f"{name}.npz", **self.values)
        return self.calls


def sliced(text: str | None) -> Any:
    """Return a slice as TransformerLens takes it: an int, a list of places, or the tuple of a range."""
    return None if text is None else ast.literal_eval(text)


def prepare(folder: Path, scratch: Path) -> Path:
    """Copy a model to where its folder's name, which decides about the architecture there, says nothing."""
    copy = scratch / f"tiny-{len(list(scratch.iterdir()))}"
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    settings = json.loads((copy / "config.json").read_text())
    settings["n_ctx"] = settings.get("n_positions")  # as the published configurations have it
    (copy / "config.json").write_text(json.dumps(settings))
    PreTrainedTokenizerFast.from_pretrained(str(copy)).save_pretrained(str(copy))
    return copy


def gemma2_settings(path: Path) -> dict[str, Any]:
    """Return TransformerLens' own settings of Gemma 2 2B with the sizes of a tiny one, as no others are known there."""
    config = json.loads((path / "config.json").read_text())
    return dict(loading.convert_hf_model_config("google/gemma-2-2b")) | {
        "d_model": config["hidden_size"],
        "d_head": config["head_dim"],
        "n_heads": config["num_attention_heads"],
        "n_key_value_heads": config["num_key_value_heads"],
        "d_mlp": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_ctx": config["max_position_embeddings"],
        "d_vocab": config["vocab_size"],
        "window_size": config["sliding_window"],
        "attn_types": ["local", "global"],
        "attn_scale": config["query_pre_attn_scalar"] ** 0.5,
    }


def build(folder: Path, processing: str, scratch: Path) -> HookedTransformer:
    """Return a model as `HookedTransformer.from_pretrained` makes it, but from a folder."""
    choices, copy = PROCESSING[processing], prepare(folder, scratch)
    native = AutoModelForCausalLM.from_pretrained(str(copy), torch_dtype=torch.float32).eval()
    known = loading.convert_hf_model_config
    if folder.name == "gemma2":
        settings = gemma2_settings(copy)
        loading.convert_hf_model_config = lambda *_, **__: dict(settings)
    config = loading.get_pretrained_model_config(
        str(copy), fold_ln=choices["fold_ln"], device="cpu", default_prepend_bos=False, dtype=torch.float32
    )
    loading.convert_hf_model_config = known
    state = loading.get_pretrained_state_dict(str(copy), config, native, dtype=torch.float32)
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(str(copy)), move_to_device=False)
    if config.output_logits_soft_cap > 0:
        choices = choices | {"center_unembed": False}
    model.load_and_process_state_dict(state, **choices)
    return model.eval()


def check_against_recorded(model: HookedTransformer, folder: Path) -> None:
    """Refuse a model that does not give what was recorded for it."""
    inputs = np.load(folder / "inputs.npz")
    logits, cache = model.run_with_cache(torch.from_numpy(inputs["ids"]))
    np.testing.assert_allclose(logits.numpy(), inputs["logits"], atol=1e-4)
    if (folder / "tl2.npz").exists():
        for name, values in np.load(folder / "tl2.npz").items():
            if name in cache.cache_dict:
                np.testing.assert_allclose(cache[name].numpy(), values, atol=1e-4, err_msg=name)


def repeated(folder: Path) -> torch.Tensor:
    """Return two sequences of six ids twice, so that there is something to detect.

    Their texts (`t40`, ...) do not begin with that of a special token, as `t176` would.
    """
    half = np.load(folder / "inputs.npz")["ids"][:2, :6] % 60 + 40
    return torch.from_numpy(np.concatenate([half, half], 1))


def choices(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield every combination of arguments."""
    for values in product(*options.values()):
        yield dict(zip(options, values, strict=True))


def record_stacks(to: Recording, cache: Any) -> None:
    """Record the stacks of an `ActivationCache`."""
    asked: list[tuple[str, dict[str, Any]]] = [("decompose_resid", {}), ("accumulated_resid", {})]
    some = {"pos_slice": SOME_POSITIONS}
    modes = ("all", "attn", "mlp")
    asked += [("decompose_resid", some | one) for one in choices(layer=(None, 1, 0), mode=modes)]
    asked += [("decompose_resid", some | one) for one in choices(layer=(-1, 1), mode=modes, incl_embeds=(False,))]
    asked += [("decompose_resid", some | one) for one in choices(layer=(1, 0), mode=modes, mlp_input=(True,))]
    asked += [("decompose_resid", some | one) for one in choices(layer=(None, 1, 0), apply_ln=(True,))]
    asked += [("decompose_resid", some | {"layer": 1, "mlp_input": True, "apply_ln": True})]
    asked += [("decompose_resid", {"layer": 2, "mlp_input": True, "mode": mode}) for mode in ("all", "mlp")]
    asked += [
        ("accumulated_resid", some | one)
        for one in choices(layer=(None, 1, 0), incl_mid=(False, True), apply_ln=(False, True))
    ]
    asked += [
        ("accumulated_resid", some | one) for one in choices(layer=(1, -1), mlp_input=(True,), apply_ln=(False, True))
    ]
    asked += [
        ("stack_head_results", some | one)
        for one in choices(layer=(-1, 1), incl_remainder=(False, True), apply_ln=(False, True))
    ]
    asked += [("stack_head_results", some | {"layer": 0, "incl_remainder": last}) for last in (False, True)]
    asked += [
        ("stack_neuron_results", some | one)
        for one in choices(layer=(-1, 1), neuron_slice=("[7, 1]", "(2, 5)"), apply_ln=(False, True))
    ]
    asked += [("stack_neuron_results", {"pos_slice": "-1", "layer": 1, "incl_remainder": True})]
    full = "get_full_resid_decomposition"
    asked += [(full, {"pos_slice": "-1"}), (full, {"pos_slice": "4", "layer": 1, "mlp_input": True, "apply_ln": True})]
    asked += [
        (full, some | {"expand_neurons": False} | one)
        for one in choices(layer=(1, 0), mlp_input=(False, True), apply_ln=(False, True))
    ]
    asked += [(full, some | {"expand_neurons": False})]
    for method, arguments in asked:
        given = {name: sliced(value) if name.endswith("slice") else value for name, value in arguments.items()}
        to.add(method, lambda m=method, g=given: getattr(cache, m)(return_labels=True, **g), **arguments)
    for one in choices(layer=(0, 1, 2), mlp_input=(False, True), include_mlp_biases=(False, True)):
        to.add("accumulated_bias", lambda o=one: cache.model.accumulated_bias(**o), **one)
    stack = cache.accumulated_resid()
    for one in (
        {"layer": None},
        {"layer": 0},
        {"layer": 1, "mlp_input": True},
        {"layer": -1, "pos_slice": "(3, 5)"},
        {"layer": -1, "batch_slice": "[1, 0]"},
        {"layer": 1, "pos_slice": "-1", "batch_slice": "1"},
    ):
        given = {name: sliced(value) if name.endswith("slice") else value for name, value in one.items()}
        positions = stack if "pos_slice" not in one else utils.Slice(given["pos_slice"]).apply(stack, dim=-2)
        to.add("apply_ln_to_stack", lambda g=given, p=positions: cache.apply_ln_to_stack(p, **g), **one)


def record_logit_attrs(to: Recording, cache: Any, ids: torch.Tensor, weights: str) -> None:
    """Record logits shared out over components and heads."""
    following = torch.roll(ids, -1, 1)
    stacks = {
        "decompose_resid": cache.decompose_resid(),
        "stack_head_results": cache.stack_head_results(-1),
    }
    asked = (
        {"tokens": 77},
        {"tokens": 77, "incorrect_tokens": 50},
        {"tokens": "t77", "incorrect_tokens": "t50"},
        {"tokens": "following"},
        {"tokens": "following", "pos_slice": "(2, 9)"},
        {"tokens": "following", "pos_slice": "-2"},
        {"tokens": "following", "batch_slice": "[1, 0]"},
        {"tokens": "following", "batch_slice": "1", "pos_slice": "3"},
    )
    for (kind, stack), one in product(stacks.items(), asked):
        positions, batch = (utils.Slice(sliced(one.get(name))) for name in ("pos_slice", "batch_slice"))
        of_rows = batch.apply(positions.apply(following, dim=1), dim=0)
        tokens = of_rows if one["tokens"] == "following" else one["tokens"]
        given = dict(one, tokens=tokens) | {
            name: sliced(one[name]) for name in ("pos_slice", "batch_slice") if name in one
        }
        chosen = positions.apply(stack, dim=-2)
        to.add("logit_attrs", lambda c=chosen, g=given: cache.logit_attrs(c, **g), stack=kind, weights=weights, **one)


def record_detection(to: Recording, model: HookedTransformer, ids: torch.Tensor) -> None:
    """Record how close heads come to patterns."""
    texts = [" ".join(f"t{number}" for number in row) for row in ids.tolist()]
    assert torch.equal(model.to_tokens(texts), ids)
    custom = torch.tril(torch.ones(12, 12)) / torch.arange(1, 13)[:, None]
    patterns: dict[str, Any] = {**{name: name for name in HEAD_NAMES}, "uniform": custom}

    def cached(sequence: int) -> Any:
        only = model.run_with_cache(texts[sequence], names_filter=lambda name: name.endswith("hook_pattern"))[1]
        return only.remove_batch_dim()

    for one in choices(
        sequence=(0, 1),
        pattern=tuple(patterns),
        error_measure=("mul", "abs"),
        exclude_bos=(False, True),
        exclude_current_token=(False, True),
    ):
        given = {key: one[key] for key in ("error_measure", "exclude_bos", "exclude_current_token")}
        number, pattern = one["sequence"], patterns[one["pattern"]]
        to.add(
            "detect_head",
            lambda n=number, p=pattern, g=given: detect_head(model, texts[n], p, cache=cached(n), **g),
            **one,
        )
    whole = {"sequence": 0, "pattern": "previous_token_head"}
    to.add("detect_head, some heads", lambda: detect_head(model, texts[0], HEAD_NAMES[0], [(1, 2)], cached(0)), **whole)
    to.add("detect_head, no cache", lambda: detect_head(model, texts[0], HEAD_NAMES[0]), **whole)
    listed = {"pattern": "induction_head", "error_measure": "abs", "exclude_bos": True}
    to.add(
        "detect_head, list of prompts",
        lambda: detect_head(model, texts, "induction_head", exclude_bos=True, error_measure="abs"),
        **listed,
    )

    def second_call() -> Any:
        cache = cached(0)
        detect_head(model, texts[0], HEAD_NAMES[0], cache=cache, exclude_bos=True)
        return detect_head(model, texts[0], HEAD_NAMES[0], cache=cache)

    to.add("detect_head, after one with exclude_bos", second_call, **whole)


def record_weights(to: Recording, models: dict[str, HookedTransformer]) -> None:
    """Record composition, copying, factored matrices and singular vectors."""
    for processing in ("native", "processed"):
        model = models[processing]
        for mode in "QKV":
            to.add(
                "all_composition_scores", lambda m=model, k=mode: m.all_composition_scores(k), mode=mode, on=processing
            )
        circuits = {"ov_copying": model.W_E @ model.OV @ model.W_U, "qk_matching": model.W_E @ model.QK @ model.W_E.T}
        for name, circuit in circuits.items():
            values = circuit.eigenvalues
            to.add(name, lambda v=values: v.sum(-1).real / v.abs().sum(-1), on=processing)
    d_model = models["native"].cfg.d_model
    vector, square = torch.linspace(-1, 1, d_model), torch.eye(d_model)[:, :3] * 2
    for name in ("OV", "QK"):
        matrix = getattr(models["native"], name)
        results: dict[str, Callable[[], Any]] = {
            "AB": lambda m=matrix: m[1, 2].AB,
            "BA": lambda m=matrix: m.BA,
            "U S": lambda m=matrix: m[1, 0].collapse_r() @ m[1, 0].collapse_r().T,
            "S Vh": lambda m=matrix: m[0, 2].collapse_l().T @ m[0, 2].collapse_l(),
            "S": lambda m=matrix: m.S,
            "eigenvalues": lambda m=matrix: m.eigenvalues,
            "norm": lambda m=matrix: m.norm(),
            "make_even": lambda m=matrix: m.make_even()[0, 1].AB,
            "T": lambda m=matrix: m.T[0, 3].AB,
            "corner": lambda m=matrix: m.get_corner(2),
            "@ vector": lambda m=matrix: m @ vector,
            "vector @": lambda m=matrix: vector @ m,
            "@ matrix": lambda m=matrix: (m @ square).AB,
            "index": lambda m=matrix: m[1, :2, 3, 2:5].AB,
        }
        for result, function in results.items():
            to.add("FactoredMatrix", function, matrix=name, result=result)
    for processing in ("native", "processed"):
        interpreter = SVDInterpreter(models[processing])
        for kind, head in (("OV", 1), ("OV", 3), ("w_in", None), ("w_out", None)):
            to.add(
                "get_singular_vectors",
                lambda i=interpreter, k=kind, h=head: i.get_singular_vectors(k, 1, num_vectors=5, head_index=h),
                vector_type=kind,
                head_index=head,
                on=processing,
            )


def record_losses(to: Recording, model: HookedTransformer, ids: torch.Tensor, folder: Path) -> None:
    """Record losses with and without padding, and the accuracy."""
    mask = torch.from_numpy(np.load(folder / "inputs.npz")["mask"][:2])
    to.add("loss", lambda: model(ids, return_type="loss"))
    to.add("loss", lambda: model(ids, return_type="loss", loss_per_token=True), loss_per_token=True)
    to.add("loss", lambda: model(ids, return_type="loss", attention_mask=mask), attention_mask=True)
    to.add("lm_accuracy", lambda: utils.lm_accuracy(model(ids), ids, per_token=True).float())


def record_lens(to: Recording, model: HookedTransformer, cache: Any) -> None:
    """Record each stream's logits at the final norm's scale, as the documentation of `accumulated_resid` does it."""
    streams, labels = cache.accumulated_resid(apply_ln=True, return_labels=True, pos_slice=sliced("(8, 11)"))
    to.add("logit_lens", lambda: (streams @ model.W_U + model.b_U, labels), pos_slice="(8, 11)")


def record_family(family: str, scratch: Path) -> dict[str, Any]:
    """Record everything of one tiny model."""
    folder, to = MODELS / family, Recording()
    models = {name: build(folder, name, scratch) for name in PROCESSING}
    check_against_recorded(models["native"], folder)
    ids = repeated(folder)
    caches = {name: model.run_with_cache(ids)[1] for name, model in models.items()}
    record_stacks(to, caches["native"])
    for name, cache in caches.items():
        record_logit_attrs(to, cache, ids, name)
    record_detection(to, models["native"], ids)
    record_weights(to, models)
    record_losses(to, models["native"], ids, folder)
    record_lens(to, models["folded"], caches["folded"])
    to.values["ids"] = ids.numpy().astype(np.float32)
    return to.write(family)


def record_weights_of(family: str, scratch: Path) -> dict[str, Any]:
    """Record what weights alone say of one more tiny model."""
    folder, to = MODELS / family, Recording()
    models = {name: build(folder, name, scratch) for name in ("native", "processed")}
    check_against_recorded(models["native"], folder)
    record_weights(to, models)
    return to.write(family)


def record_bert(scratch: Path) -> dict[str, Any]:
    """Record the stacks that an encoder's cache gives."""
    folder, to = MODELS / "bert", Recording()
    copy = str(prepare(folder, scratch))
    native = BertForPreTraining.from_pretrained(copy, torch_dtype=torch.float32).eval()
    config = loading.get_pretrained_model_config(copy, device="cpu", dtype=torch.float32)
    model = HookedEncoder(config, AutoTokenizer.from_pretrained(copy), move_to_device=False)
    state = loading.get_pretrained_state_dict(copy, config, native, dtype=torch.float32)
    model.load_state_dict(state, strict=False)
    recorded = np.load(folder / "tl2.npz")
    cache = model.run_with_cache(torch.from_numpy(np.load(folder / "inputs.npz")["ids"]))[1]
    for name, values in recorded.items():
        if name in cache.cache_dict:
            np.testing.assert_allclose(cache[name].numpy(), values, atol=1e-4, err_msg=name)
    for method, given in (
        ("accumulated_resid", {}),
        ("accumulated_resid", {"apply_ln": True}),
        ("accumulated_resid", {"layer": 1, "apply_ln": True}),
        ("decompose_resid", {}),
    ):
        to.add(method, lambda m=method, g=given: getattr(cache, m)(return_labels=True, pos_slice=-1, **g), **given)
    to.add("stack_head_results", lambda: cache.stack_head_results(pos_slice=-1, return_labels=True))
    return to.write("bert")


def record_evaluations(scratch: Path) -> dict[str, Any]:
    """Record the evaluations on a small trained model; ids are drawn from its own, smaller vocabulary."""
    model, to = build(INDUCTION, "native", scratch), Recording()
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    drawn = torch.randint
    torch.randint = lambda low, high, size: drawn(low, min(high, model.cfg.d_vocab), size)
    for prepend_bos in (True, False):
        torch.manual_seed(0)
        one = {"batch_size": 3, "subseq_len": 40, "prepend_bos": prepend_bos}
        to.add("induction_loss", lambda o=one: evals.induction_loss(model, device="cpu", **o), **one)
        to.values[f"induction_loss ids/{len(seen) - 1}"] = seen[-1].numpy().astype(np.float32)
    torch.randint = drawn

    task = {
        "templates": ["Then [B] and [A] went to the [PLACE]. [B] gave the [OBJECT] to [A]"],
        "names": ["ROMEO", "JULIET"],
        "nouns": {"PLACE": ["market"], "OBJECT": ["ring"]},
    }
    for symmetric in (True, False):
        random.seed(0)
        torch.manual_seed(0)
        dataset = evals.IOIDataset(model.tokenizer, num_samples=6, symmetric=symmetric, **task)
        to.add(
            "ioi_eval",
            lambda d=dataset: (list(evals.ioi_eval(model, dataset=d).values()), [one["text"] for one in d.samples]),
            symmetric=symmetric,
            **task,
        )
    everything = evals.IOIDataset(model.tokenizer, num_samples=100)
    distinct = sorted({one["text"] for one in everything.samples})
    to.add("IOIDataset", lambda: (torch.tensor(len(everything)), distinct), num_samples=100)
    return to.write("induction-2l")


def record_t5(scratch: Path) -> dict[str, Any]:
    """Record what T5's decoder gives at its first positions when a later token changes."""
    folder, to = MODELS / "t5", Recording()
    inputs = np.load(folder / "inputs.npz")
    copy = str(prepare(folder, scratch))
    native = T5ForConditionalGeneration.from_pretrained(copy, torch_dtype=torch.float32).eval()
    gates = {}
    for stack in ("encoder", "decoder"):  # its conversion knows plain MLPs only, its blocks gated ones too
        for layer, block in enumerate(getattr(native, stack).block):
            mlp = block.layer[-1].DenseReluDense
            gates[f"{stack}.{layer}.mlp.W_gate"], mlp.wi = mlp.wi_0.weight.T, mlp.wi_1
    known = loading.convert_hf_model_config
    # `scale_decoder_outputs: false` of newer configurations is what it takes untied embeddings to mean
    gated = {"act_fn": "gelu_new", "gated_mlp": True, "tie_word_embeddings": False}
    loading.convert_hf_model_config = lambda *given, **named: known(*given, **named) | gated
    config = loading.get_pretrained_model_config(copy, device="cpu", dtype=torch.float32)
    loading.convert_hf_model_config = known
    model = HookedEncoderDecoder(config, AutoTokenizer.from_pretrained(copy), move_to_device=False)
    model.load_state_dict(
        loading.get_pretrained_state_dict(copy, config, native, dtype=torch.float32) | gates, strict=False
    )
    first = torch.from_numpy(inputs["decoder_input_ids"][:, :1])
    logits = model(torch.from_numpy(inputs["ids"]), decoder_input=first)
    np.testing.assert_allclose(logits.numpy(), np.load(folder / "tl2.npz")["logits"], atol=1e-4)
    for changed in (False, True):
        decoder = torch.from_numpy(inputs["decoder_input_ids"].copy())
        decoder[:, 5] = (decoder[:, 5] + 3 * changed) % config.d_vocab
        with torch.no_grad():
            to.add(
                "T5 decoder",
                lambda d=decoder: model(torch.from_numpy(inputs["ids"]), decoder_input=d)[:2, :2],
                changed_at=5 if changed else None,
            )
    return to.write("t5")


@torch.no_grad()
def main() -> None:
    """Record all."""
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        calls = {family: record_family(family, scratch) for family in FAMILIES}
        calls |= {family: record_weights_of(family, scratch) for family in OF_WEIGHTS_ONLY}
        calls |= {"bert": record_bert(scratch), "t5": record_t5(scratch)}
        calls |= {"induction-2l": record_evaluations(scratch)}
    lines = [
        f"{json.dumps(family)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(call)}" for key, call in of.items())
        + "\n}"
        for family, of in calls.items()
    ]
    (HERE / "calls.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
