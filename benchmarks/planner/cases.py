"""The command lines whose plans are held against committed ones, and timed."""

CASES: dict[str, tuple[str, ...]] = {
    "llama3_8b_on_8_h200": ("+experiment=llama3_8b", "hardware=h200", "training.global_batch_size=16"),
    "llama3_70b_in_stages_on_512_h100": (
        *("+experiment=llama3_70b", "hardware=h100", "hardware.nodes=64", "mesh=3d", "mesh.pipeline=4"),
        *("mesh.tensor=8", "training.global_batch_size=512", "pipeline.microbatches=16"),
    ),
    "qwen3_30b_a3b_on_256_h100": ("+experiment=qwen3_30b_a3b", "hardware=h100", "hardware.nodes=32"),
    "llama3_8b_128k_on_64_h100": (
        *("+experiment=llama3_8b", "hardware=h100", "hardware.nodes=8", "mesh=long_context"),
        *("data.seq_len=131072", "training.global_batch_size=8"),
    ),
    "gpt2_124m_on_1_h200": ("+experiment=gpt2_124m", "hardware=h200", "hardware.topology=1x1", "mesh=single"),
    "gemma2_9b_fp8_on_8_b200": (
        *("+experiment=gemma2_9b", "hardware=b200", "training.precision=fp8"),
        "training.global_batch_size=8",
    ),
    "llama_1b_on_8_v5p": (
        *("+experiment=llama_1b", "hardware=v5p", "hardware.topology=2x2x2", "mesh=fsdp"),
        *("training.global_batch_size=16", "model.num_layers=4"),
    ),
    "llama_1b_in_tensors_on_8_v6e": (
        *("+experiment=llama_1b", "hardware=v6e", "hardware.topology=2x4", "mesh=tensor_sequence"),
        *("mesh.tensor=4", "training.global_batch_size=16", "model.num_layers=4"),
    ),
}
