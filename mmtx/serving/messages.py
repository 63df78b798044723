"""Requests of OpenAI's API, in which unknown fields are errors, and their messages as documents.

Media come as bytes in the request; nothing is fetched.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import UploadFile
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mmtx.data.forms import CHAT_ROLES
from mmtx.data.media import image_size
from mmtx.data.storage import decode_base64
from mmtx.document import Document, TextPart, Turn
from mmtx.errors import InputError
from mmtx.medium import Audio, Image, ReadMedium
from mmtx.modality.base import media_tokenizer
from mmtx.pipeline import Model
from mmtx.serving.limits import Limits

MAX_PIECE_LENGTH = 32  # most characters in a piece of text: SentencePiece makes none of more than 16 by default
MAX_STOP_LENGTH = 1000  # characters of a stop sequence, which are compared with the text after each token
MAX_CHOICES = 128  # of all prompts of a request together, as in OpenAI's API
LIMIT = AliasChoices("max_completion_tokens", "max_tokens")


class Body(BaseModel):
    """A body in which unknown fields and values of other types, such as "yes" for true, are errors; null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_unset(cls, given: Any) -> Any:
        """Clients send fields that they leave unset, including ones that are unknown here, as null, [] or {}."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items()
                if value is not None and (name in cls.model_fields or value not in ([], {}))}


def as_items(given: Any) -> Any:
    """Plain text -> a list of one text item."""
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


def as_inputs(given: Any) -> Any:
    """Text or a list of items -> a list of one input."""
    several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
    return given if several else [given]


def refuse_ids(given: Any) -> Any:
    """Raise an error for a list of token ids: clients make them with a tokenizer of OpenAI's, so they would be another text here."""
    if isinstance(given, list) and given and all(type(one) is int for one in given):
        raise PydanticCustomError("token_ids", "Input should be text, not token ids, which another tokenizer may have made: for text "
                                  "set check_embedding_ctx_length=False in LangChain, tokenized_requests=False in lm-eval")
    return given


def as_texts(given: Any) -> Any:
    """One text -> a list of it."""
    return [given] if isinstance(given, str) else given


class ImageURL(Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # ignored: the tokenizer determines the size of pictures


class InputAudio(Body):
    data: str
    format: str = ""  # ignored: it is detected from the bytes


class TextItem(Body):
    type: Literal["text"]
    text: str


class ImageItem(Body):
    type: Literal["image_url"]
    image_url: ImageURL


class AudioItem(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio


Item = Annotated[TextItem | ImageItem | AudioItem, Field(discriminator="type")]
Content = Annotated[list[Item], BeforeValidator(as_items)]
TextContent = Annotated[list[TextItem], BeforeValidator(as_items)]
StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Message(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    name: str | None = None


class RequestBody(Body):
    """Fields of all requests; what names the user is ignored."""

    model: str
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class SamplingBody(RequestBody):
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1, validation_alias=LIMIT)
    n: int = Field(1, ge=1, le=1)

    @model_validator(mode="before")
    @classmethod
    def one_limit(cls, given: Any) -> Any:
        """Some clients send the limit under both of its names, for servers that know only one of them."""
        names = "max_tokens", "max_completion_tokens"
        if not isinstance(given, dict) or None in (limits := [given.get(name) for name in names]):
            return given
        if limits[0] != limits[1]:
            raise PydanticCustomError("two_limits", "Input should be one limit, not different max_tokens and max_completion_tokens")
        return {name: value for name, value in given.items() if name != names[0]}


class StreamOptions(Body):
    include_usage: bool = False


class ResponseFormat(Body):
    type: Literal["text"]


class ChoicesBody(SamplingBody):
    n: int = Field(1, ge=1, le=MAX_CHOICES)


class TextBody(ChoicesBody):
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    stop: Annotated[list[StopSequence], Field(max_length=4), BeforeValidator(as_texts)] = []
    metadata: dict[str, str] = {}  # ignored: OpenAI stores it with the answer
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"


class ChatBody(TextBody):
    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[Literal["text"]] = ["text"]
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True  # ignored: of tools, which are refused


class CompletionBody(TextBody):
    prompt: Annotated[list[Annotated[TextContent, BeforeValidator(refuse_ids)]], Field(min_length=1, max_length=MAX_CHOICES),
                      BeforeValidator(as_inputs)]
    max_tokens: int | None = Field(None, ge=0, validation_alias=LIMIT)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None


class EmbeddingsBody(RequestBody):
    input: Annotated[list[Annotated[Content, BeforeValidator(refuse_ids)]], Field(min_length=1), BeforeValidator(as_inputs)]
    encoding_format: Literal["float", "base64"] = "float"


class TranscriptionBody(SamplingBody):
    model_config = ConfigDict(strict=False)  # all values in a form are text

    file: UploadFile
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    timestamp_granularities: list[Literal["segment"]] = Field([], alias="timestamp_granularities[]")  # the only ones there are


class ImagesBody(ChoicesBody):
    prompt: TextContent
    size: str = Field("auto", pattern=r"^(auto|\d{1,4}x\d{1,4})$")
    response_format: Literal["b64_json"] = "b64_json"


class SpeechBody(SamplingBody):
    input: TextContent
    voice: Any = None  # ignored: a voice is described in the text
    response_format: Literal["mp3", "wav", "flac", "opus", "pcm"] = "mp3"
    stream_format: Literal["audio"] = "audio"
    speed: float = Field(1, ge=1, le=1)


def read_document(model: Model, messages: Sequence[Message], limits: Limits) -> Document:
    """Messages -> a document whose media are decoded but not yet encoded. Raises InputError that names the message and the part."""
    return Document(tuple(
        Turn(CHAT_ROLES[message.role], read_parts(model, message.content, limits, f"messages[{number}].content"))
        for number, message in enumerate(messages)))


def read_parts(model: Model, content: Sequence[Item], limits: Limits, where: str) -> tuple[TextPart | ReadMedium, ...]:
    """Items of a message -> parts; media are decoded but not yet encoded."""
    return tuple(read_item(model, item, limits, f"{where}[{number}]") for number, item in enumerate(content))


def read_item(model: Model, item: Item, limits: Limits, where: str) -> TextPart | ReadMedium:
    return read_part(model, to_medium(item, limits, where), limits, where)


def read_part(model: Model, medium: str | Image | Audio, limits: Limits, where: str) -> TextPart | ReadMedium:
    """Decode one medium, or encode text. Raises InputError if it is not valid, or a sound is too long."""
    try:
        if isinstance(medium, str):
            return cast(TextPart, model.encode_parts([medium])[0])
        read = model.read_medium(medium)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    rate = media_tokenizer(model.tokenizers, read.kind).codes_per_second
    if rate is not None and (seconds := math.prod(read.grid) / rate) > limits.seconds:
        raise InputError(f"{where}: found {seconds:.1f} s, expected up to {limits.seconds:g} s")
    return read


def to_medium(item: Item, limits: Limits, where: str) -> str | Image | Audio:
    """The content of an item. Raises InputError if it is too large, before it is decoded."""
    if isinstance(item, TextItem):
        if len(item.text) > (most := MAX_PIECE_LENGTH * limits.tokens):  # tokenizing it would take seconds
            raise InputError(f"{where}: found {len(item.text)} characters, expected up to {most}")
        return item.text
    if isinstance(item, AudioItem):
        return Audio(_decoded(item.input_audio.data, f"{where}.input_audio.data"))
    where = f"{where}.image_url.url"
    head, comma, text = item.image_url.url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise InputError(f"{where}: found {head[:40]!r}, expected data:image/...;base64,... (this server does not fetch URLs)")
    data = _decoded(text, where)
    width, height = image_size(data, where)
    if width * height > limits.pixels:
        raise InputError(f"{where}: {width} x {height} pixels, expected up to {limits.pixels} in all")
    return Image(data)


def _decoded(text: str, where: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError as error:
        raise InputError(f"{where}: not base64 ({error}), found {text[:40]!r}") from None
