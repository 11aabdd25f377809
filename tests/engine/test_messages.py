"""Every sampling field survives the socket, and those that ask for nothing take no bytes."""

from dsv4serve.engine.messages import Outputs, Submit, decode_from_engine, decode_from_frontend, encode
from dsv4serve.types import Request, RequestOutput, SamplingParams, TokenLogprobs


def test_requests_with_all_fields_are_the_same_on_the_other_side():
    sampling = SamplingParams(
        max_tokens=5,
        num_logprobs=0,
        num_prompt_logprobs=3,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=2.0,
        logit_bias={5: 1.5, 129279: -100.0},
        banned_token_ids=(7,),
        bad_words=((1, 2), (3,)),
        thinking_budget=0,
        thinking_end_ids=(9, 10),
    )
    message = Submit(Request(request_id="r", prompt_ids=[1], sampling=sampling))
    assert decode_from_frontend(encode(message)) == message


def test_log_probabilities_are_the_same_on_the_other_side():
    entry = TokenLogprobs(-0.25, [3, 4], [-0.25, -7.0])
    message = Outputs([RequestOutput(request_id="r", token_ids=[3], logprobs=[entry], prompt_logprobs=[entry] * 2)])
    assert decode_from_engine(encode(message)) == message


def test_a_plain_output_is_small():
    plain = encode(Outputs([RequestOutput(request_id="r", token_ids=[3])]))
    assert len(plain) < 60, plain
