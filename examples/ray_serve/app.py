"""A Ray Serve application that answers questions from passages, with a headrace endpoint as its model.

    ask ──► Ask ──► Retriever   finds the passages nearest to the question; questions are batched
             │ ───► Prompt      makes the messages
             │ ───► Model       the endpoint, any OpenAI server: tokens stream back as they come
             ▼
           streamed text, and at its end where it was found

Run it beside a headrace system, on the same Ray cluster or not (docs/guides/ray-serve.md):

    pip install "ray[serve]" openai
    serve run serve.yaml

The model's replicas scale by headrace's own rules; the deployments here by Ray Serve's. No token passes Ray
before it is in the `Model` deployment.
"""

import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

PASSAGES = [
    "Bern is the seat of the federal government of Switzerland.",
    "The Aare is the longest river that both rises and ends in Switzerland.",
    "A headrace is the channel that brings water to a turbine.",
    "A tailrace takes the water away from a turbine, back to the river.",
    "The penstock is the pipe through which water falls to the turbine under pressure.",
    "A surge tank takes up the pressure when a turbine is stopped at once.",
    "Rome is the capital of Italy.",
    "The Po is the longest river of Italy.",
]
WORD = re.compile(r"[a-z]+")
MAX_PASSAGES = 2
ANSWER_LIMIT_S = 60.0
api = FastAPI()


def words(text: str) -> Counter[str]:
    return Counter(WORD.findall(text.lower()))


@serve.deployment(max_ongoing_requests=256)
class Retriever:
    """The nearest passages by the cosine of their weighted words."""

    def __init__(self, passages: list[str]) -> None:
        self._passages = passages
        counts = [words(passage) for passage in passages]
        frequencies = Counter(word for count in counts for word in count)
        self._columns = {word: column for column, word in enumerate(sorted(frequencies))}
        self._weights_W = np.array([math.log(len(passages) / frequencies[word]) for word in self._columns])
        self._matrix_PW = self._vectors(counts)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def find(self, questions: list[str]) -> list[list[str]]:
        """Return for each question its passages, nearest first. Called with one, computed for many."""
        scores_QP = self._vectors([words(question) for question in questions]) @ self._matrix_PW.T
        nearest_QK = np.argsort(-scores_QP, axis=1, kind="stable")[:, :MAX_PASSAGES]
        return [
            [self._passages[place] for place in places if scores[place] > 0]
            for places, scores in zip(nearest_QK, scores_QP, strict=True)
        ]

    def _vectors(self, counts: list[Counter[str]]) -> np.ndarray:
        vectors = np.zeros((len(counts), len(self._columns)))
        for row, count in enumerate(counts):
            for word, number in count.items():
                if (column := self._columns.get(word)) is not None:
                    vectors[row, column] = number * self._weights_W[column]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1.0)


@serve.deployment
class Prompt:
    """What the model is asked."""

    def build(self, question: str, passages: list[str]) -> list[dict[str, str]]:
        known = "\n".join(f"- {passage}" for passage in passages) or "- nothing"
        return [
            {"role": "system", "content": f"Answer in one sentence, from what is known:\n{known}"},
            {"role": "user", "content": question},
        ]


class ModelFailed(Exception):
    """The endpoint did not answer. The client's own errors cannot pass between Ray's processes: they do not
    unpickle."""


@serve.deployment(max_ongoing_requests=256)
class Model:
    """The headrace endpoint."""

    def __init__(self, base_url: str, model: str, api_key: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=ANSWER_LIMIT_S)
        self._model = model

    async def check_health(self) -> None:
        """Ray Serve asks this every few seconds: without its model this deployment is not healthy."""
        await self._client.models.retrieve(self._model, timeout=5)

    async def stream(self, messages: list[Any]) -> AsyncIterator[str]:
        """Yield the answer's text as it comes. Raises ModelFailed."""
        try:
            chunks = await self._client.chat.completions.create(
                model=self._model, messages=messages, stream=True, max_tokens=64, temperature=0
            )
            async for chunk in chunks:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    yield text
        except openai.OpenAIError as error:
            raise ModelFailed(type(error).__name__) from None


class Question(BaseModel):
    question: str = Field(min_length=1, max_length=2000)


# Above the class that uses it: `serve.ingress` pickles it at the moment of the class's definition.
def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(api)
class Ask:
    """The application's address: POST /ask {"question": "..."}."""

    def __init__(
        self, retriever: DeploymentHandle, prompt: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        self._retriever, self._prompt = retriever, prompt
        self._model = model.options(stream=True)

    @api.post("/ask")
    async def ask(self, question: Question) -> StreamingResponse:
        passages = await self._retriever.find.remote(question.question)
        messages = await self._prompt.build.remote(question.question, passages)
        return StreamingResponse(self._answer(messages, passages), media_type="text/event-stream")

    async def _answer(self, messages: list[dict[str, str]], passages: list[str]) -> AsyncIterator[str]:
        """Events: text as it comes, then the sources; or, the stream having begun, an error as its last."""
        try:
            async for text in self._model.stream.remote(messages):
                yield event({"text": text})
        except Exception as error:
            cause = getattr(error, "cause", error)  # Ray wraps what another process raised
            reason = cause if isinstance(cause, ModelFailed) else type(cause).__name__
            yield event({"error": f"the model did not answer: {reason}"})
        else:
            yield event({"sources": passages})


def build(args: dict[str, str]) -> serve.Application:
    """Return the application. args: base_url of the OpenAI server, and, if wanted, model and api_key."""
    unknown = sorted(args.keys() - {"base_url", "model", "api_key"})
    if unknown or "base_url" not in args:
        raise ValueError(f"got {sorted(args)}; needed is base_url, allowed besides: model, api_key")
    model = Model.bind(args["base_url"], args.get("model", "chat"), args.get("api_key", "none"))
    return Ask.bind(Retriever.bind(PASSAGES), Prompt.bind(), model)
