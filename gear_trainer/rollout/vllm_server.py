"""One vLLM server for all ranks, on devices of its own: it may go on sampling while the trainer works.

Rank 0 starts it, or finds one that runs at `rollout.server.url`. Requests go over HTTP, token ids in and out; weights by vLLM's
own transfer, with the requests that are under way paused and resumed: vLLM says of each token which weights sampled it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.rollout import vllm_colocated as colocated
from gear_trainer.rollout.engine import Engine, take_device
from gear_trainer.rollout.serving import Served
from gear_trainer.rollout.types import Completion, Request
from gear_trainer.rollout.vllm_colocated import adapter_rank
from gear_trainer.rollout.weight_transfer import Transfer, TransferError, chunks

LOOK = 5.0  # seconds between looks at a server that is waited for
FOUND_WITHIN = 10.0  # seconds in which a server that runs already must answer
EPITAPH = 3.0  # seconds that a server which breaks off may take to end
LATER = "--resume goes on from the last checkpoint"
ADAPTER = "policy"  # the name of a run's adapters, which requests give as their model


class ServerError(RunError):
    """A rollout server that ended, hangs, or refuses what it must do."""


class ServerVllm(Engine):
    """A rank's connection to the server. Any thread may sample; each collects what it submitted itself. Rank 0 sends weights."""

    samples_beside_training = True

    def __init__(self, cfg: Config, model_path: str):
        from transformers import AutoTokenizer

        self.cfg, self.server = cfg, cfg.rollout.server
        self.device = take_device()
        check_devices(self.server.devices, self.device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.served: Served | None = None
        self.url = self.server.url or self._start(model_path)
        self.url = self.url.rstrip("/")
        self.eos = AutoTokenizer.from_pretrained(model_path).eos_token_id
        self.http = Http(self.url, self.server.timeout)
        self.transfer: Transfer | None = None
        self.adapters, self.has_adapter = adapter_rank(cfg) > 0, False
        self._lanes = threading.local()
        self._wait_for_start()
        self._check_it_serves_this()

    # --- sampling -------------------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request]) -> list[Completion]:
        asked = [self._ask(request) for request in requests]
        self._wait(asked, FIRST_EXCEPTION)
        return [future.result() for future in asked]

    def submit(self, ticket: int, request: Request) -> None:
        self._lane[self._ask(request)] = ticket

    def collect(self) -> list[tuple[int, Completion]]:
        lane = self._lane
        self._wait(list(lane), FIRST_COMPLETED)
        return [(lane.pop(future), future.result()) for future in list(lane) if future.done()]

    @property
    def _lane(self) -> dict[Future[Completion], int]:
        """This thread's requests under way, with their tickets."""
        return vars(self._lanes).setdefault("asked", {})

    def _ask(self, request: Request) -> Future[Completion]:
        return self.http.start(self._sampled(request, self.version))

    async def _sampled(self, request: Request, version: int) -> Completion:
        body = _body(request) | ({"model": ADAPTER} if self.adapters else {})
        answer = await self.http.patient("/inference/v1/generate", body)
        return completion(answer["choices"][0], self.eos, version)

    def _wait(self, asked: list[Future[Completion]], until: str) -> None:
        """Return once one of them is there, or all. Raises ServerError, where the server is lost within LOOK and the time that it
        has to answer."""
        left = set(asked)
        while left:
            done, left = wait(left, timeout=LOOK, return_when=until)
            for future in done:
                if error := future.exception():
                    raise self._lost(error)
            if done and until == FIRST_COMPLETED:
                return
            if left and not done:
                self._look()

    # --- weights --------------------------------------------------------------------------------------------------------

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.rank:
            for _ in weights:
                pass  # gathering is collective; what this rank asks for meanwhile waits until the server goes on
        else:
            with self._losing():
                self._send(weights)
        self.version += 1

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.transfer is None:
            workers = self.http.ask("GET", "/get_world_size")["world_size"]
            self.transfer = Transfer(self._post, backend(), _address(self.url), workers, self.server.timeout)
        self._post("/pause?mode=keep")  # and drops the keys and values of requests under way: they are computed anew
        self._post("/start_weight_update")
        for chunk in chunks(weights, self.device):
            self.transfer.send(chunk)
        self._post("/finish_weight_update", {"weight_version": str(self.version + 1)})
        self._post("/resume")

    def push_adapter(self, folder: Path) -> None:
        if self.rank == 0:
            with self._losing():
                self._post("/pause?mode=keep")
                if self.has_adapter:
                    self._call("replace_adapter", str(folder))
                else:
                    self._name_adapter(folder)
                self._post("/update_weight_version", {"new_version": str(self.version + 1)})
                self._post("/resume")
        self.version += 1

    def _name_adapter(self, folder: Path) -> None:
        """Load the first adapter, under the name by which requests ask for it. Raises ConfigError."""
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder)})
        except Refused as error:
            raise self._started_otherwise(error) from None
        self.has_adapter = True

    def _call(self, method: str, *arguments: str) -> Any:
        """What the first worker returns of a method of workers.Extension, which all of them run."""
        return self._post("/collective_rpc", {"method": method, "args": arguments})["results"][0]

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Raises ServerError where the server refuses what is asked of it within."""
        try:
            yield
        except (Refused, TransferError) as error:
            raise self._lost(error) from error

    def _post(self, path: str, body: Any = None) -> Any:
        return self.http.ask("POST", path, body)

    def forget(self) -> None:
        with self._losing():
            self._post("/reset_prefix_cache")

    # --- the server -----------------------------------------------------------------------------------------------------

    def _start(self, model_path: str) -> str:
        """Start a server on rank 0; where it will be, on all ranks."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # rank 0, as its launcher told all of them
        place: list[Any] = [f"http://{host}:{_free_port()}"]
        if dist.is_initialized():
            dist.broadcast_object_list(place, device=self.device)
        if self.rank == 0:
            log = self.cfg.run_dir / "vllm_server.log"
            self.served = Served(command(self.cfg, model_path, place[0]), environment(self.cfg), log)
        return place[0]

    def _wait_for_start(self) -> None:
        """Return once it serves. Raises ServerError, or ConfigError for one that was to run already."""
        until = time.monotonic() + (FOUND_WITHIN if self.server.url else self.server.start_timeout)
        while True:
            try:
                self.http.ask("GET", "/health")
                return
            except Refused as error:
                why = str(error)
            if self.served and (end := self.served.ended()):
                raise ServerError(f"the rollout server ended before it served ({end}): see {self.served.log}")
            if time.monotonic() > until:
                break
            time.sleep(0.5)
        if self.server.url:
            raise ConfigError(f"rollout.server.url={self.url}: {why}; start it (--dry-run prints how), or correct the address")
        limit = self.server.start_timeout
        raise ServerError(f"the rollout server does not serve within rollout.server.start_timeout={limit:g} s ({why})")

    def _check_it_serves_this(self) -> None:
        """Ask for one token, and give its weights the number 0. Raises ConfigError where the server was started otherwise than it
        must be."""
        try:
            if self.rank == 0:
                self._take_over()
            self.http.ask("POST", "/inference/v1/generate", _body(Request([self.eos], 1, 0)))
        except Refused as error:
            raise self._started_otherwise(error) from None

    def _started_otherwise(self, error: Refused) -> ConfigError:
        return ConfigError(f"rollout server {self.url}: {error}; start it as --dry-run says")

    def _take_over(self) -> None:
        """Begin anew with a server that an earlier run may have left in mid-push."""
        for path in ("/finish_weight_update", "/shutdown_weight_transfer_engine") if self.server.url else ():
            with suppress(Refused):  # nothing was begun
                self._post(path)
        self._post("/resume")
        self._post("/update_weight_version", {"new_version": "0"})
        self.has_adapter = self.adapters and bool(self._call("adapters"))  # an earlier run's

    def _look(self) -> None:
        """Raises ServerError where the server is lost."""
        with self._losing():
            self.http.ask("GET", "/health")

    def _lost(self, error: BaseException) -> ServerError:
        """The one line about a server that does not do what it must."""
        if isinstance(error, ServerError):
            return error
        end = self.served.ended(EPITAPH) if self.served else None
        what = f"ended ({end})" if end else f"is lost ({' '.join(str(error).split()) or repr(error)})"
        where = f", see {self.served.log}" if self.served else ""
        return ServerError(f"rollout server {self.url} {what}{where}: {LATER}")

    @classmethod
    def prepare(cls, cfg: Config) -> None:
        colocated.set_environment()
        take_device()

    @classmethod
    def check(cls, cfg: Config, sizes: dict[str, Any] | None) -> None:
        """The keys of rollout.server go together, the KV cache holds a sequence, vLLM knows its arguments. Raises ConfigError."""
        check_server(cfg, sizes)
        if sizes is not None:
            colocated.check_kv_cache(cfg, sizes)
        if adapter_rank(cfg):
            colocated.check_adapters(cfg)
        if cfg.rollout.vllm.engine_args:
            colocated.check_engine_args(cfg)

    @classmethod
    def describe(cls, cfg: Config) -> str:
        """The command that starts the server, or that must have."""
        url = cfg.rollout.server.url or "http://127.0.0.1:8000"
        who = "started with" if cfg.rollout.server.url else "started by rank 0 as"
        given = " ".join(f"{name}={value}" for name, value in sorted(_settings(cfg).items()))
        return f"rollout server, {who}\n  {given} \\\n  {shlex.join(['python', *command(cfg, cfg.model.path, url)[1:]])}\n"


# --- requests and answers ---------------------------------------------------------------------------------------------------


class Refused(RuntimeError):
    """A request that got no answer, or an error. One line."""


class Http:
    """Requests to one server, from any thread. `timeout`: seconds that a server has for what takes it no work."""

    def __init__(self, url: str, timeout: float):
        import httpx

        self._httpx, self.timeout = httpx, timeout
        # a connection each: the server closes those idle for 5 s, and a request that takes one up then is lost
        fresh = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=url, timeout=timeout, limits=fresh, trust_env=False)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="rollout server", daemon=True).start()
        patience = httpx.Timeout(None, connect=timeout)
        self._async = httpx.AsyncClient(base_url=url, timeout=patience, limits=fresh, trust_env=False)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, of JSON or None. Raises Refused."""
        try:
            return self._answer(path, self._client.request(method, path, json=body))
        except self._httpx.TimeoutException:
            raise Refused(f"{path}: no answer within rollout.server.timeout={self.timeout:g} s") from None
        except self._httpx.HTTPError as error:
            raise Refused(f"{path}: {str(error) or type(error).__name__}") from None

    async def patient(self, path: str, body: Any) -> Any:
        """The answer to what may take long: whoever waits for it looks after the server. Raises Refused."""
        try:
            return self._answer(path, await self._async.post(path, json=body))
        except self._httpx.HTTPError as error:
            raise Refused(f"{path}: {str(error) or type(error).__name__}") from None

    def start(self, work: Coroutine[Any, Any, Completion]) -> Future[Completion]:
        """Begin what is awaited, in this object's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @staticmethod
    def _answer(path: str, response: Any) -> Any:
        if response.status_code != 200:
            raise Refused(f"{path}: HTTP {response.status_code} {' '.join(response.text.split())[:200]}".rstrip())
        told = response.headers.get("content-type", "").startswith("application/json")  # some answer in plain words
        return response.json() if told and response.content else None


def _body(request: Request) -> dict[str, Any]:
    """A request as vLLM's token-in, token-out endpoint takes it; nothing is left to a model's own generation_config.json."""
    drawn = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    counted = {"seed": request.seed, "max_tokens": request.max_tokens, "logprobs": 0, "detokenize": False}
    return {"token_ids": request.prompt_ids, "sampling_params": drawn | counted}


def completion(choice: dict[str, Any], eos: int, version: int) -> Completion:
    """The turn that a choice of the endpoint holds. `version`: where the server names none. Raises Refused where the request was
    broken off."""
    ids, reason = choice["token_ids"], choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise Refused(f"a request was broken off ({reason})")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    spans = [(int(span["version"]), span["end"] - span["start"]) for span in choice.get("weight_versions") or []]
    versions = list(itertools.chain.from_iterable([named] * length for named, length in spans))
    ended = reason == "stop" and ids[-1:] == [eos]
    if len(spans) < 2:
        return Completion(ids, logprobs, ended, spans[0][0] if spans else version)
    return Completion(ids, logprobs, ended, versions[0], versions)


# --- how it is started --------------------------------------------------------------------------------------------------------


def backend() -> str:
    """The transfer engine of this machine's vLLM."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def command(cfg: Config, model_path: str, url: str) -> list[str]:
    """The command line of a server for this configuration."""
    kwargs = colocated.engine_kwargs(cfg, model_path)
    for name in ("use_tqdm_on_load", "distributed_executor_backend", "enable_sleep_mode"):
        kwargs.pop(name, None)  # of an engine in the trainer's process
    where = urlsplit(url)
    kwargs |= {"host": where.hostname, "port": where.port or 80, "tensor_parallel_size": cfg.rollout.server.tensor_parallel_size}
    kwargs |= {"weight_transfer_config": {"backend": backend()}, "enable_scale_out": True}
    if backend() == "gloo" or adapter_rank(cfg):
        kwargs["worker_extension_cls"] = "gear_trainer.rollout.workers.Extension"
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(kwargs)]


def _flags(kwargs: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in kwargs.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return flags


def _settings(cfg: Config) -> dict[str, str]:
    """What a server's environment has beside this process' own."""
    held = {"VLLM_SERVER_DEV_MODE": "1"}  # the endpoints of weight transfer
    if adapter_rank(cfg):
        held["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if cfg.rollout.server.devices:
        held["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cfg.rollout.server.devices))
    if not torch.cuda.is_available():
        held |= {name: os.environ.get(name, value) for name, value in colocated.CPU_SETTINGS.items()}
    return held


def environment(cfg: Config) -> dict[str, str]:
    """This process' environment without what a launcher put there for a rank, which vLLM would read too."""
    mine = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR",
            "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}  # fmt: skip
    held = {name: value for name, value in os.environ.items() if name not in mine and not name.startswith("TORCHELASTIC_")}
    return held | _settings(cfg)


def _address(url: str) -> str:
    """This machine's address on the way to a server, by which its workers reach it."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port or 80)) as way:
        return way.getsockname()[0]


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


# --- looked at before a start ------------------------------------------------------------------------------------------------


def check_server(cfg: Config, sizes: dict[str, Any] | None) -> None:
    """The keys of rollout.server go together. Raises ConfigError."""
    server, args = cfg.rollout.server, cfg.rollout.vllm.engine_args
    if server.url is not None and not server.url.startswith(("http://", "https://")):
        raise ConfigError(f"rollout.server.url={server.url}: not an http address; give the base URL, as http://127.0.0.1:8000")
    if server.url is not None and server.devices:
        raise ConfigError(
            "rollout.server.devices is of a server that rank 0 starts; rollout.server.url names another: leave one out"
        )
    if "tensor_parallel_size" in args:
        raise ConfigError("rollout.vllm.engine_args.tensor_parallel_size: set rollout.server.tensor_parallel_size")
    size, devices = server.tensor_parallel_size, server.devices
    if devices and (len(devices) != size or len(set(devices)) != size):
        raise ConfigError(
            f"rollout.server.devices={devices}: a model that is split over rollout.server.tensor_parallel_size={size} GPUs takes "
            "as many, each once"
        )
    if torch.cuda.is_available() and server.url is None and not devices:
        raise ConfigError("rollout.server.devices is missing: name the GPUs of the rollout server, which no rank uses")
    split = {"num_attention_heads": "attention heads", "intermediate_size": "hidden units of a layer's MLP"}
    for name, what in split.items():
        if (count := (sizes or {}).get(name)) and count % size:
            raise ConfigError(f"rollout.server.tensor_parallel_size={size} does not divide the model's {count} {what}")
    keys = (sizes or {}).get("num_key_value_heads")
    if keys and keys % size and size % keys:  # fewer than GPUs: each GPU has a copy of one
        raise ConfigError(
            f"rollout.server.tensor_parallel_size={size} neither divides the model's {keys} key-value heads nor is their multiple"
        )


def check_devices(devices: list[int], own: torch.device) -> None:
    """Raises ConfigError where this rank's GPU is one of the server's."""
    if own.type != "cuda" or not devices:
        return
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    name = shown[own.index] if shown else str(own.index)
    if name in map(str, devices):
        raise ConfigError(
            f"rollout.server.devices={devices}: a rank trains on GPU {name}; give the server others, or start fewer ranks "
            "(deepspeed --num_gpus, --include)"
        )
