"""One module an engine, each a bench.peers.protocol.EngineModule; `ours` alone imports serve."""

OURS = "ours"
REFERENCE = "transformers"  # the others' tokens are compared with its
ENGINES = (OURS, REFERENCE, "ctranslate2", "llamacpp", "openvino", "vllm")
