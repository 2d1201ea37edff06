"""Which class of transformers a configuration is loaded as."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSeq2SeqLM

from actpipe.models.families import entry_for


def auto_class(config: Any) -> Any:
    """Return the class that loads a model with the head that its entry speaks of; causal where there is no entry.

    BERT comes with its next-sentence head where the configuration says `BertForPreTraining`.
    """
    family = entry_for(config)
    if family is None or family.task == "causal":
        return AutoModelForCausalLM
    if family.task == "seq2seq":
        return AutoModelForSeq2SeqLM
    with_next_sentence = any(name.endswith("ForPreTraining") for name in config.architectures or ())
    return AutoModelForPreTraining if with_next_sentence and family.name == "bert" else AutoModelForMaskedLM


def classes_to_try(config: Any) -> tuple[Any, ...]:
    """Return the classes that a checkpoint may be loaded as, the fullest first.

    Most BERTs were pretrained with a next-sentence head, whatever their configuration says, and TransformerLens
    loads it; those that were saved without it are loaded without.
    """
    family = entry_for(config)
    if family is not None and family.heads is not None and family.heads.next_sentence is not None:
        return AutoModelForPreTraining, AutoModelForMaskedLM
    return (auto_class(config),)
