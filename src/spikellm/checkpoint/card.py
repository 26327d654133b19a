"""The model card that is written beside a converted model."""

from __future__ import annotations

from typing import Any

from spikellm.checkpoint.config import SpikeConfig
from spikellm.conversion.record import CalibrationRecord, TrainingRecord
from spikellm.models.stored_bits import KINDS
from spikellm.models.summary import ModelSummary, summarize
from spikellm.nn.buffer_kinds import WEIGHT_KINDS


def model_card(name: str, model: Any, config: SpikeConfig) -> str:
    """Markdown with how to load the model, its figures and its recipe."""
    recipe, summary = config.parsed_recipe(), summarize(model)
    rows = "\n".join(
        f"| `{block['name']}` | {block['loss']:.4g} | {block['relative_loss']:.2%} |"
        for block in config.record["blocks"]
    )
    versions = "\n".join(
        f"- {key}: {value}" for key, value in sorted(config.record["versions"].items())
    )
    text = CalibrationRecord.model_validate(config.record["calibration"])
    started = ", each starting with the BOS token" if text.bos else ""
    notes = "".join(f"\n- {note}" for note in text.notes)
    before = ", before it was trained" if config.record.get("training") else ""
    share = summary.weight_bytes / max(summary.dense_bytes, 1)
    # a backslash at the end of a line joins it to the next
    return f"""---
library_name: transformers
tags: [spikellm, spiking-neural-network, quantization]
pipeline_tag: text-generation
---

# {name}

A spike-driven language model made by spikellm with the recipe `{recipe.name}`. {recipe.description}

## Load it

```python
import spikellm  # registers the format; without it transformers refuses the folder
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/{name}")
```

`model, tokenizer = spikellm.load("path/to/{name}")` does the same and checks more. \
On the command line: `spikellm generate path/to/{name} "Once"`.

## Figures

- converted layers: {summary.spiking_layers} of {len(summary.layers)} linear layers
- average steps over multiply-accumulates of converted layers: {summary.average_steps:.3f}
- weights of converted layers: {summary.weight_bytes:,} bytes, {share:.3f} of 16 bits a weight
- stored bits: {summary.stored.bits_a_weight:.3f} a weight of converted layers \
({_split(summary)}), \
{summary.stored.bits_a_parameter:.3f} a parameter of the whole model, \
{summary.stored.total / 8e6:,.2f} MB

Difference to the original behind each block, on the calibration text{before}:

| block | mean squared error | relative |
|---|---|---|
{rows}
{_training(config)}
## Made with

{versions}
- calibration text: {recipe.calibration.text}, {text.windows} windows of {text.seqlen} tokens\
{started}{notes}

```yaml
{recipe.to_yaml()}```
"""


def _split(summary: ModelSummary) -> str:
    """Stored bits a weight by kind, of what there is."""
    stored = summary.stored
    found = (
        f"{KINDS[kind]} {stored.share(kind):.3f}" for kind in WEIGHT_KINDS if stored.bits[kind]
    )
    return ", ".join(found)


def _training(config: SpikeConfig) -> str:
    """What training after conversion did, where there was any; ends in an empty line."""
    if not (found := config.record.get("training")):
        return ""
    record = TrainingRecord.model_validate(found)
    rows = "".join(f"| {one.update} | {one.loss:.4f} |\n" for one in record.checks)
    checks = f"\n| update | loss held out |\n|---|---|\n{rows}" if rows else ""
    notes = "".join(f"\n- {note}" for note in record.notes)
    return f"""
## Training

{record.trained:,} numbers were trained in {len(record.losses)} updates of {record.tokens:,} \
tokens, with the spikes in the loop; integers stayed as they were. The state of update \
{record.best} was kept. Losses are of a token, in nats.
{checks}{notes}
"""
