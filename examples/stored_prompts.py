"""Lets a model go on with a text. Run it twice: the second time what is stored is not computed.

python examples/stored_prompts.py MODEL TEXT_FILE [HOST:PORT]
"""

import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstore_client.transformers import PromptCache

name, text_file, *endpoint = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
inputs = tokenizer(Path(text_file).read_text(), return_tensors="pt").to(model.device)

with PromptCache(model, *endpoint) as prompt_cache:
    began_s = time.monotonic()
    with prompt_cache.session(**inputs) as session:
        output = model.generate(**session.inputs, max_new_tokens=20, do_sample=False)
    took_s = time.monotonic() - began_s

print(tokenizer.decode(output[0, session.prompt_tokens :]))
print(f"{session.restored_tokens} of {session.prompt_tokens} tokens restored; {took_s:.2f} s")
