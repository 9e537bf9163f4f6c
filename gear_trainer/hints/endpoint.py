"""A writer behind an OpenAI-compatible endpoint. Checked before a run; during one, a request that fails costs its group's
reference, never the run."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from gear_trainer.config import ConfigError, WriterConfig
from gear_trainer.tasks.common import user

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds beside a request's own timeouts: the pauses between its retries


class Endpoint:
    def __init__(self, cfg: WriterConfig, client: Any, model: str, context: int):
        self.cfg, self.client, self.model, self.context = cfg, client, model, context

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str | None]:
        """All requests at once. None where one failed after its retries, or the answer is empty. A server that answers nothing
        holds a step up by timeout * (1 + max_retries) and 10 s."""
        if not prompts:
            return []
        reasons: list[str] = []
        pool = ThreadPoolExecutor(len(prompts))
        futures = [pool.submit(self._ask, *job, reasons) for job in zip(prompts, seeds, strict=True)]
        wait(futures, self.cfg.timeout * (1 + self.cfg.max_retries) + _PATIENCE)
        pool.shutdown(wait=False, cancel_futures=True)
        texts = [future.result() if future.done() else None for future in futures]
        missing = texts.count(None)
        if missing:
            reason = reasons[0] if reasons else "no answer in time"
            _log.warning("writer.url=%s: %d of %d references failed (%s)", self.cfg.url, missing, len(texts), reason)
        return texts

    def _ask(self, prompt: str, seed: int, reasons: list[str]) -> str | None:
        try:
            text = self.request(prompt, self.cfg.max_tokens, seed)
        except Exception as error:  # the client raises its own family, and others for answers that are no completions
            reasons.append(_short(error))
            return None
        if not text:
            reasons.append("empty answer")
        return text or None

    def request(self, prompt: str, max_tokens: int, seed: int) -> str | None:
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=user(prompt),
            max_tokens=max_tokens,
            temperature=self.cfg.temperature,
            seed=seed,
        )
        return answer.choices[0].message.content


def connect(cfg: WriterConfig, context: int) -> Endpoint:
    """Find the model and ask it for one token. `context`: where neither config nor endpoint names one. Raises ConfigError."""
    openai = _package()
    client = openai.OpenAI(base_url=cfg.url, api_key=api_key(cfg), timeout=cfg.timeout, max_retries=cfg.max_retries)
    try:
        served = {model.id: model for model in client.models.list()}
    except openai.NotFoundError:
        served = {}  # some endpoints list nothing; the request below tells
    except Exception as error:
        raise _refusal(cfg, error, openai) from None
    name = _model_name(cfg, list(served))
    reported = getattr(served.get(name), "max_model_len", None)  # vLLM reports it
    endpoint = Endpoint(cfg, client, name, cfg.max_model_len or reported or context)
    try:
        endpoint.request("Say OK.", 1, 0)
    except Exception as error:
        raise _refusal(cfg, error, openai) from None
    return endpoint


def check_settings(cfg: WriterConfig) -> None:
    """Check the endpoint's settings without asking it. Raises ConfigError."""
    if not cfg.url:
        return
    if not cfg.url.startswith(("http://", "https://")):
        raise ConfigError(f"writer.url={cfg.url}: not an http address; give the base URL, as http://127.0.0.1:8000/v1")
    api_key(cfg)
    _package()


def api_key(cfg: WriterConfig) -> str:
    if cfg.api_key_env is None:
        return "EMPTY"  # never the client's own default, OPENAI_API_KEY: it would be sent to whatever server the url names
    if not cfg.api_key_env.isidentifier():
        raise ConfigError("writer.api_key_env: give the name of the environment variable with the key, not the key itself")
    if not os.environ.get(cfg.api_key_env):
        raise ConfigError(f"writer.api_key_env={cfg.api_key_env}: no such environment variable; export it on every node")
    return os.environ[cfg.api_key_env]


def _package() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError(f"writer.url needs the package openai ({error}): pip install openai, or drop writer.url") from None
    return openai


def _model_name(cfg: WriterConfig, served: list[str]) -> str:
    listed = ", ".join(served[:20]) + (f" and {len(served) - 20} more" if len(served) > 20 else "")
    if cfg.model is None:
        if len(served) == 1:
            return served[0]
        raise ConfigError(f"writer.model is missing: {cfg.url} serves {listed or 'what it does not list'}; name one")
    if served and cfg.model not in served:
        raise ConfigError(f"writer.model={cfg.model}: {cfg.url} serves {listed}; name one of these")
    return cfg.model


def _refusal(cfg: WriterConfig, error: Exception, openai: Any) -> ConfigError:
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        what = f"the key in {cfg.api_key_env}" if cfg.api_key_env else "a request without a key"
        return ConfigError(f"writer.url={cfg.url}: it refuses {what} ({_short(error)}); set writer.api_key_env")
    if isinstance(error, openai.APIConnectionError):
        return ConfigError(f"writer.url={cfg.url}: not reachable ({_short(error)}); start the server or correct the address")
    if isinstance(error, openai.NotFoundError):
        return ConfigError(f"writer.url={cfg.url}: nothing there ({_short(error)}); most base URLs end in /v1")
    return ConfigError(f"writer.url={cfg.url}: it does not answer a small request ({_short(error)}); see the server's log")


def _short(error: Exception) -> str:
    cause = f": {error.__cause__}" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}".splitlines()[0][:200]
