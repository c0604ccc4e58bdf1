"""Messages are unchanged by the wire format, and a malformed one costs one log line."""

import dataclasses
import json

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import AntherError
from protocol import records
from protocol.messages import (
    MAX_JSON_CHARS,
    NEWEST,
    DeviceReport,
    Evaluate,
    Evaluation,
    ExamplePrivacy,
    Personalize,
    Personalized,
    Query,
    Train,
    TrainingPlan,
    Update,
    from_json,
    payloads,
    to_json,
)

PRIVACY = ExamplePrivacy(noise_multiplier=1.5, clip=0.01, sampling_rate=0.25, draws=2, delta=1e-3)
PLAN = TrainingPlan(run="r", round=1, base="b", rank=8, steps=4, batch_size=4, learning_rate=1e-3, privacy=PRIVACY)
REPORT = DeviceReport(
    device="wr-1",
    base="b",
    profile="pi4",
    memory_gib=4,
    examples_per_second=2.5,
    watts=5.0,
    uplink_mbps=10.0,
    downlink_mbps=20.0,
    metered=True,
)
UPDATE = Update(
    device="wr-1",
    run="r",
    round=1,
    rank=8,
    adapter=b"\x00\xff",
    release=False,
    seconds=1.5,
    joules=3.0,
    quality="estimate",
    loss=None,
    epsilon=2.0,
    events=6,
)
REQUESTS = [
    Query(),
    Train(plan=PLAN, adapter=b"abc"),
    Train(plan=dataclasses.replace(PLAN, privacy=None), adapter=b""),
    Evaluate(run="r", round=0, adapter=b"x"),
    Personalize(
        run="r", round=2, adapter=b"x", rank=4, steps=3, batch_size=2, learning_rate=0.1, look_every=5, patience=3
    ),
]
REPLIES = [
    REPORT,
    UPDATE,
    Evaluation(device="wr-1", round=0, base=0.5, shared=0.25),
    Personalized(device="wr-1", seconds=1.0, joules=2.0, quality="measured"),
]


@pytest.mark.parametrize("message", REQUESTS + REPLIES, ids=lambda message: type(message).__name__)
def test_json_roundtrip(message):
    assert from_json(type(message), to_json(message), **payloads(message)) == message


def test_payloads_are_not_in_the_json():
    assert "adapter" not in json.loads(to_json(UPDATE))
    assert payloads(UPDATE) == {"adapter": b"\x00\xff"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"DeviceReport\.extra: unknown"),
        ({"watts": None}, r"watts: must be float, is NoneType"),
        ({"watts": "5"}, r"watts: must be float, is str"),
        ({"watts": True}, r"watts: must be float, is bool"),
        ({"watts": 10**400}, r"watts: must be finite"),
        ({"metered": 1}, r"metered: must be bool, is int"),
        ({"device": 1}, r"device: must be str, is int"),
    ],
)
def test_wrong_field_is_named(change, message):
    with pytest.raises(AntherError, match=message):
        from_json(DeviceReport, json.dumps(json.loads(to_json(REPORT)) | change))


def test_malformed_json_is_rejected():
    good = to_json(REPORT)
    without = {key: value for key, value in json.loads(good).items() if key != "watts"}
    for text, message in [
        (json.dumps(without), "watts: missing"),
        (good[:-1] + ',"watts":1}', "'watts' is duplicated"),
        (good.replace("2.5", "NaN"), "NaN"),
        (good.replace("2.5", "1e999"), "examples_per_second: must be finite"),
        ("[]", "not a JSON object"),
        ("[" * 60_000, "nested"),
        (good[:-5], "malformed"),
        (good + " " * MAX_JSON_CHARS, "too long"),
    ]:
        with pytest.raises(AntherError, match=message):
            from_json(DeviceReport, text)


def test_nested_fields_are_strict():
    fields = json.loads(to_json(REQUESTS[1]))
    fields["plan"]["privacy"]["seed"] = 1  # plans contain no seed
    with pytest.raises(AntherError, match=r"Train\.plan\.privacy\.seed: unknown"):
        from_json(Train, json.dumps(fields), adapter=b"")
    fields["plan"] = [1]
    with pytest.raises(AntherError, match=r"Train\.plan: must be dict, is list"):
        from_json(Train, json.dumps(fields), adapter=b"")


def test_payload_in_json_is_rejected():
    with pytest.raises(AntherError, match="adapter: missing"):
        from_json(Update, to_json(UPDATE))
    smuggled = json.dumps(json.loads(to_json(UPDATE)) | {"adapter": "x"})
    with pytest.raises(AntherError, match="adapter: must be bytes"):
        from_json(Update, smuggled)
    with pytest.raises(AntherError, match="adapter: must be sent next to"):
        from_json(Update, smuggled, adapter=b"")


def test_non_finite_number_is_not_encoded():
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(dataclasses.replace(REPORT, watts=float("nan")))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda message: type(message).__name__)
def test_request_records_roundtrip(request_):
    kind = records.message_type(request_)
    wire = RecordDict.inflate(*_deflated(records.request_to_records(request_)))
    assert records.request_from_records(kind, wire) == request_


@pytest.mark.parametrize(
    ("kind", "reply"), zip(["query", "train", "evaluate", "train.personalise"], REPLIES, strict=True)
)
def test_reply_records_roundtrip(kind, reply):
    wire = RecordDict.inflate(*_deflated(records.reply_to_records(reply)))
    assert records.reply_from_records(kind, wire) == reply


def _deflated(content):
    """A RecordDict as Flower sends it, with its children as the receiver inflates them."""
    children = {}
    for key, record in content.children.items():
        inner = dict((record.children or {}).items())
        children[key] = type(record).inflate(record.deflate(), inner)
    return content.deflate(), children


def test_cached_request_gives_separate_messages():
    train = Train(plan=PLAN, adapter=b"abc")
    one, other = records.request_to_records(train), records.request_to_records(train)
    one["more"] = ConfigRecord({"x": 1})
    assert list(other) == ["message", "arrays"]
    another = Train(plan=dataclasses.replace(PLAN, steps=99), adapter=b"other")
    assert records.request_from_records("train", records.request_to_records(another)) == another
    assert records.request_from_records("train", other) == train
    echoed = dataclasses.replace(train, echo=7)
    other = records.request_to_records(echoed)
    assert other["arrays"] is one["arrays"]  # different messages share the adapter's record
    assert records.request_from_records("train", other) == echoed


def with_records(**changes):
    """The records of an update with some replaced, or removed if None."""
    good = records.reply_to_records(UPDATE)
    return RecordDict({name: record for name, record in (dict(good) | changes).items() if record is not None})


def with_array(name="adapter", **changes):
    whole = {"dtype": "uint8", "shape": (2,), "stype": "safetensors", "data": b"\x00\xff"}
    return with_records(arrays=ArrayRecord({name: Array(**whole | changes)}))


def with_config(**changes):
    good = records.reply_to_records(UPDATE)["message"]
    return with_records(message=ConfigRecord(dict(good) | changes))


EMPTY = Array("uint8", (0,), "safetensors", b"")
MALFORMED = [
    (RecordDict(), "must contain exactly json, sha256 and version"),
    (ConfigRecord({"json": "{}"}), "must contain exactly json, sha256 and version"),
    (with_records(message=None), "must contain exactly json, sha256 and version"),
    (with_records(message=MetricRecord({"json": 1})), "must contain exactly json, sha256 and version"),
    (with_records(extra=ConfigRecord()), "at most one adapter"),
    (with_config(extra=1), "at most one adapter"),
    (with_config(json=1), "not a text"),
    (with_config(json="x" * (MAX_JSON_CHARS + 1)), f"at most {MAX_JSON_CHARS} characters"),
    (with_config(sha256="0" * 64), "damaged in transit"),
    (with_config(sha256=0), "damaged in transit"),
    (with_config(version=0), "the sender has to update"),
    (with_config(version=NEWEST + 1, more="x"), "the receiver has to update"),
    (with_config(version="1"), "not a whole number"),
    (with_config(version=b"1"), "not a whole number"),
    (with_config(json=to_json(UPDATE) + " "), "damaged in transit"),
    (with_config(json="\ud800"), "damaged in transit"),
    (with_records(arrays=None), "damaged in transit"),
    (with_records(arrays=MetricRecord({"adapter": 1})), "not a MetricRecord"),
    (with_records(arrays=ArrayRecord()), "one safetensors entry"),
    (with_array("other"), "one safetensors entry"),
    (with_array(stype="numpy.ndarray"), "one safetensors entry"),
    (with_array(dtype="float32"), "dtype or shape"),
    (with_array(shape=(2**62,)), "dtype or shape"),
    (with_array(shape=()), "dtype or shape"),
    (with_array(data=b"\x00\xfe"), "damaged in transit"),
    (
        with_records(
            arrays=ArrayRecord({f"adapter{k or ''}": Array("uint8", (0,), "safetensors", b"") for k in (0, 1)})
        ),
        "not these 2 entries",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), MALFORMED, ids=[f"{k}" for k in range(len(MALFORMED))])
def test_malformed_records_are_rejected(wrong, message):
    with pytest.raises(AntherError, match=message) as caught:
        records.reply_from_records("train", wrong)
    assert "\n" not in str(caught.value)


def test_unknown_message_type_is_rejected():
    with pytest.raises(AntherError, match="no such message type"):
        records.reply_from_records("train.other", records.reply_to_records(UPDATE))


def test_oversized_adapter_is_rejected():
    good = records.reply_to_records(UPDATE)
    assert records.reply_from_records("train", good, max_bytes=2) == UPDATE
    with pytest.raises(AntherError, match="2 bytes, the maximum is 1"):
        records.reply_from_records("train", good, max_bytes=1)
    train = records.request_to_records(REQUESTS[1])
    assert records.request_from_records("train", train, max_bytes=3) == REQUESTS[1]
    with pytest.raises(AntherError, match="3 bytes, the maximum is 2"):
        records.request_from_records("train", train, max_bytes=2)
    smuggled = RecordDict(dict(records.reply_to_records(REPORT)) | {"arrays": good["arrays"]})
    with pytest.raises(AntherError, match="the maximum is 0"):
        records.reply_from_records("query", smuggled, max_bytes=0)


@pytest.mark.parametrize("message", [UPDATE, REPORT, REQUESTS[1]], ids=lambda message: type(message).__name__)
def test_flipped_bit_fails_the_checksum(message):
    """The bit is in the text, the adapter, or the checksum."""
    request = message in REQUESTS
    good = (records.request_to_records if request else records.reply_to_records)(message)
    kind = "query" if message is REPORT else "train"
    read = records.request_from_records if request else records.reply_from_records
    assert read(kind, good) == message

    def flipped(data):
        for bit in range(8 * len(data)):
            yield data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

    for key in ("json", "sha256"):
        for text in flipped(good["message"][key].encode()):
            damaged = ConfigRecord(dict(good["message"]) | {key: text.decode(errors="surrogateescape")})
            with pytest.raises(AntherError, match="damaged in transit"):
                read(kind, RecordDict(dict(good) | {"message": damaged}))
    for data in flipped(payloads(message).get("adapter", b"")):
        damaged = ArrayRecord({"adapter": Array("uint8", (len(data),), "safetensors", data)})
        with pytest.raises(AntherError, match="damaged in transit"):
            read(kind, RecordDict(dict(good) | {"arrays": damaged}))


def test_untrusted_text_is_one_log_line():
    for key in ("a\nb", "\ud800", "\x1b[2J", "é"):
        with pytest.raises(AntherError, match="unknown") as caught:
            from_json(DeviceReport, json.dumps(json.loads(to_json(REPORT)) | {key: 1}))
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
