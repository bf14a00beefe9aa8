"""Build and pre-train a small decoder for minutes on one core: python pretrain_decoder.py RESOURCES OUTPUT.

A Llama of 4 layers and 128 units with a byte-pair tokenizer of its own, trained on a million tokens of the corpora
below, on none of which the suite of decoders specialises or is tested. The same corpora and versions give the same
bytes.
"""

import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merganser.lab.suites.texts import Texts

CORPORA = ("crowdflower", "goemotions", "smile", "cola", "rte", "wnli", "twitter", "wnut17", "gum", "wikigold")
TOKENS, POSITIONS, BATCH, STEPS, RATE = 2048, 128, 16, 600, 3e-3

resources, output = Path(sys.argv[1]), Path(sys.argv[2])
if (output / "config.json").is_file():
    sys.exit(0)  # what is there is not made again
torch.set_num_threads(1)  # sums of several threads are of another order
torch.manual_seed(1)
suite = Texts(resources)
texts = [row["text"] for name in CORPORA for row in suite.read(name, "train")]

backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
backend.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=TOKENS,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
backend.train_from_iterator(texts, trainer)
backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    model_max_length=POSITIONS,
    **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
)

stream = torch.tensor([token for encoding in backend.encode_batch(texts) for token in encoding.ids])
blocks = stream[: len(stream) // POSITIONS * POSITIONS].view(-1, POSITIONS)
sys.stderr.write(f"{len(texts)} texts, {len(stream)} tokens\n")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=TOKENS, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
)  # fmt: skip
order = torch.randperm(len(blocks))[: STEPS * BATCH].split(BATCH)
optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=len(order), pct_start=0.05)
start, mean = time.perf_counter(), 0.0
for step, places in enumerate(order, 1):
    loss = model(input_ids=blocks[places], labels=blocks[places]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
    if step % 50 == 0 or step == len(order):
        sys.stderr.write(f"step {step} of {len(order)}, loss {mean:.3f}, {time.perf_counter() - start:.0f} s\n")
model.save_pretrained(output)
tokenizer.save_pretrained(output)
