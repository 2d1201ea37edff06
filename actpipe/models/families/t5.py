"""T5 and mT5: scores without scaling and with a learned bias by distance, RMSNorm, no biases."""

from typing import Any

from actpipe.models.families.entry import CrossAttention, Family, Projection


def _stack(name: str, which: str, mlp: str, **differences: Any) -> Family:
    """Return one of the two stacks; the MLP is the last layer of its blocks."""
    return Family(
        **{
            "name": name,
            "model_types": (),
            "norm": "RMS",
            "embed": f"{which}.embed_tokens",
            "blocks": f"{which}.block",
            "final_norm": f"{which}.final_layer_norm",
            "ln1": "layer.0.layer_norm",
            "attention": "layer.0.SelfAttention",
            "q": Projection("layer.0.SelfAttention.q"),
            "k": Projection("layer.0.SelfAttention.k"),
            "v": Projection("layer.0.SelfAttention.v"),
            "out": "layer.0.SelfAttention.o",
            "relative_bias": "layer.0.SelfAttention.relative_attention_bias",
            "ln2": "layer.1.layer_norm",
            "mlp": f"{mlp}.DenseReluDense",
            "w_in": Projection((f"{mlp}.DenseReluDense.wi_1", f"{mlp}.DenseReluDense.wi")),
            "w_gate": Projection(f"{mlp}.DenseReluDense.wi_0"),
            "gated": lambda config: config.is_gated_act,
            "w_out": f"{mlp}.DenseReluDense.wo",
            **differences,
        }
    )


_DECODER = _stack(
    "t5's decoder",
    "decoder",
    "layer.2",
    cross=CrossAttention(
        attention="layer.1.EncDecAttention",
        q=Projection("layer.1.EncDecAttention.q"),
        k=Projection("layer.1.EncDecAttention.k"),
        v=Projection("layer.1.EncDecAttention.v"),
        out="layer.1.EncDecAttention.o",
    ),
    ln3="layer.2.layer_norm",
)

FAMILIES = (
    _stack(
        "t5",
        "encoder",
        "layer.1",
        model_types=("t5", "mt5"),
        causal=False,
        task="seq2seq",
        decoder=_DECODER,
        takes_position_ids=False,
        unembed_input_scale=lambda config: (
            config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        ),
    ),
)
