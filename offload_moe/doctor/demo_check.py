"""The demo model, if it is built: answers must be the same with many slots and with few."""

from offload_moe.demo.source import MODEL_NAME
from offload_moe.doctor.outcome import Failed, Skipped
from offload_moe.engine.load import load
from offload_moe.store import Store
from offload_moe.store.installed import installed

FEW_SLOTS = 20
NUM_TOKENS = 12
CONTEXT = 64
PROMPT = "The capital of France is"


def check_demo() -> str:
    """Raises: Skipped when there is no demo, Failed when the number of slots changes its answer."""
    built = [entry for entry in installed() if entry.kind == "store" and (entry.source or "").startswith(MODEL_NAME)]
    if not built:
        raise Skipped("not built yet; `offload-moe chat` builds it")
    store = Store.open(built[0].path)
    with load(store.path, exact=True, context=CONTEXT) as model:
        answers = [model.generate(PROMPT, raw=True, temperature=0.0, max_new_tokens=NUM_TOKENS)]
        vram, ram = model.placement.vram, model.placement.ram
    few_ram, few_vram = ram.bytes_with(FEW_SLOTS), vram.bytes_with(FEW_SLOTS) if vram else None
    with load(store.path, exact=True, context=CONTEXT, ram=few_ram, vram=few_vram) as model:
        answers.append(model.generate(PROMPT, raw=True, temperature=0.0, max_new_tokens=NUM_TOKENS))
        num_evictions = model.stats.num_evictions
    if answers[0] != answers[1] or not answers[0].strip():
        raise Failed(f"{answers[0]!r} with many slots, {answers[1]!r} with {FEW_SLOTS}")
    return f"the same {NUM_TOKENS} tokens with many slots and with few ({num_evictions} evictions)"
