"""DistilBERT: BERT without segments."""

from actpipe.models.families.entry import Family, Heads, Projection

FAMILIES = (
    Family(
        name="distilbert",
        model_types=("distilbert",),
        norm="LN",
        embed="embeddings.word_embeddings",
        pos_embed="embeddings.position_embeddings",
        embed_norm="embeddings.LayerNorm",
        blocks="transformer.layer",
        final_norm=None,
        attention="attention",
        q=Projection("attention.q_lin"),
        k=Projection("attention.k_lin"),
        v=Projection("attention.v_lin"),
        out="attention.out_lin",
        ln1="sa_layer_norm",
        mlp="ffn",
        w_in=Projection("ffn.lin1"),
        w_out="ffn.lin2",
        ln2="output_layer_norm",
        heads=Heads(dense="vocab_transform", norm="vocab_layer_norm", activation=lambda config: config.activation),
        post_norm=True,
        causal=False,
        task="masked",
    ),
)
