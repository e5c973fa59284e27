"""Merges the adapter that sft_train.py has left into its base model, and checks what was saved.

    python merge.py

The folder ./merged_model opens with transformers alone.
"""

import json
import sys
from pathlib import Path

import torch
from options import DTYPE, need, parse
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

options = parse(__doc__, model="./sft_final")
adapter = need(options.model_name_or_path, "sft_train.py")
base_name = json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]

base_model = AutoModelForCausalLM.from_pretrained(base_name, dtype=DTYPE, device_map="auto")
model = PeftModel.from_pretrained(base_model, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer("Two large pizzas with olives for Anna.", return_tensors="pt").to(model.device)
with torch.no_grad():
    before = model(**inputs).logits

merged = model.merge_and_unload()
merged.save_pretrained("./merged_model")
tokenizer.save_pretrained("./merged_model")

saved = AutoModelForCausalLM.from_pretrained("./merged_model", dtype=DTYPE, device_map="auto").eval()
with torch.no_grad():
    gap = float((saved(**inputs).logits - before).abs().max())
print(f"./merged_model: its logits differ from those of the adapter's model by {gap:.1e} at most")
# Rounding to half precision moves logits by some hundredths; a merge that went wrong moves them by whole numbers.
if gap > (1e-3 if DTYPE is torch.float32 else 0.5):
    sys.exit("The merged model is not the adapter's model: do not use it.")
