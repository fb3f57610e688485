"""A real vLLM server as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx


class VLLMProcess:
    """Serves until the `with` block ends.

    Args:
        folder: The exported decoder.
        flags: Of the server.
        dtype: Of the weights.
        python: Of the environment with vLLM; None for this one.
        compiled: Whether vLLM compiles the model, which takes a minute.
    """

    PLUGIN_FLAGS = (
        "--enable-mm-embeds",
        "--enable-scale-out",
        "--limit-mm-per-prompt",
        '{"image": 64}',
        "--hf-overrides",
        '{"architectures": ["SoftRAGLlamaForCausalLM"]}',
    )

    def __init__(
        self,
        folder: Path,
        *,
        flags: Sequence[str],
        dtype: str = "float32",
        python: str | None = None,
        compiled: bool = False,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            python or sys.executable,
            # `vllm serve` of the CPU wheel looks for the metadata of the GPU one.
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", dtype, "--served-model-name", "demo"),
            *(() if compiled else ("--enforce-eager",)),
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers."""
        cores = sorted(os.sched_getaffinity(0))
        left_out = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH")
        environment = {k: v for k, v in os.environ.items() if k not in left_out} | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # The default leaves a core unused.
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self._log = tempfile.NamedTemporaryFile()
        # A session of its own: killing it takes the engine's processes along.
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 400
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self.log()
                self.kill()
                raise RuntimeError(f"The server did not start:\n{log[-3000:]}")
            time.sleep(0.5)

    @property
    def pid(self) -> int:
        """Of the process that answers HTTP, which is the session of all of them."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return what it has written so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Kill it and its engine at once, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            self._log.close()

    def __enter__(self) -> VLLMProcess:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill it."""
        self.kill()
