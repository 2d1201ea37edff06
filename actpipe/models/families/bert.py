"""BERT and RoBERTa: norms after each sum, segments, a layer and a norm before the unembedding."""

from typing import Any

from actpipe.models.families.entry import Family, Heads, Projection


def _layout(name: str, *model_types: str, **differences: Any) -> Family:
    return Family(
        **{
            "name": name,
            "model_types": model_types,
            "norm": "LN",
            "embed": "embeddings.word_embeddings",
            "pos_embed": "embeddings.position_embeddings",
            "token_type_embed": "embeddings.token_type_embeddings",
            "embed_norm": "embeddings.LayerNorm",
            "blocks": "encoder.layer",
            "final_norm": None,
            "attention": "attention.self",
            "q": Projection("attention.self.query"),
            "k": Projection("attention.self.key"),
            "v": Projection("attention.self.value"),
            "attn_out": "attention.output.dense",
            "out": "attention.output.dense",
            "ln1": "attention.output.LayerNorm",
            "mlp": "output.dense",
            "w_in": Projection("intermediate.dense"),
            "w_out": "output.dense",
            "ln2": "output.LayerNorm",
            "post_norm": True,
            "causal": False,
            "task": "masked",
            **differences,
        }
    )


FAMILIES = (
    _layout(
        "bert",
        "bert",
        heads=Heads(
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            pooler="bert.pooler",
            next_sentence="cls.seq_relationship",
        ),
    ),
    _layout(
        "roberta",
        "roberta",
        "xlm-roberta",
        "camembert",
        heads=Heads(dense="lm_head.dense", norm="lm_head.layer_norm", activation=lambda _: "gelu"),
        pos_embed_offset=lambda config: config.pad_token_id + 1,
        pads_have_no_position=True,
    ),
)
