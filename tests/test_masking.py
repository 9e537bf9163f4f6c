"""What a credit reference may not show the teacher, case by case."""

import pytest

from gear_trainer.hints.masking import PLACEHOLDER, mask

M = PLACEHOLDER
ANSWERS = [  # (answer, text, what is left)
    ("12", "so 12 it is", f"so {M} it is"),
    ("12", "123, 412, 0.12, 12.5, x12, -12, 1,212", "123, 412, 0.12, 12.5, x12, -12, 1,212"),
    ("12", "12. Or (12), 12.0, $12, +12, 12cm", f"{M}. Or ({M}), {M}, ${M}, {M}, {M}cm"),
    ("7", "12-7 and 5+7", f"12-{M} and 5+{M}"),
    ("-7", "it is -7, \u22127, not 7; 12-7", f"it is {M}, {M}, not 7; 12-7"),
    ("1234", "1,234 = 1234 = 1{,}234 = 1\\,234", f"{M} = {M} = {M} = {M}"),
    ("1234", "1,234,567 and 51,234", "1,234,567 and 51,234"),
    ("1,234", "1234 units", f"{M} units"),
    ("1000", "1e3 or 1000.00", f"{M} or {M}"),
    ("0", "0 and 10 and 0.5", f"{M} and 10 and 0.5"),
    ("0.75", "3/4 = .75?, 0.75, 0.750", f"{M} = .75?, {M}, {M}"),
    ("12", "24/2", "24/2"),
    (r"\frac{3}{4}", r"\dfrac{3}{4} or \frac34 or 3/4 or 0.75, not 13/4, 3/40", f"{M} or {M} or {M} or {M}, not 13/4, 3/40"),
    (r"-\frac{1}{2}", r"-\frac{1}{2}, -1/2, -0.5, 0.5", f"{M}, {M}, {M}, 0.5"),
    (r"\frac{\pi}{2}", r"\frac{\pi}{2}, \tfrac{ \pi }{ 2 }, pi/2, π / 2", f"{M}, {M}, {M}, {M}"),
    (r"2\sqrt{3}", r"2\sqrt{3}, 2 \sqrt 3, 2√3, 2*sqrt(3), 2 and 3, 2√35", f"{M}, {M}, {M}, {M}, 2 and 3, 2√35"),
    (r"\left(1, 2\right)", r"the point (1,2) or \left( 1, 2 \right)", f"the point {M} or \\left{M}"),
    (r"\boxed{12}", "12", M),
    (r"12\text{ cm}", "12 cm", f"{M} cm"),
    (r"90^\circ", "90 degrees", f"{M} degrees"),
    ("x=5", "x = 5, so 5", f"x = {M}, so {M}"),
    ("50\\%", "50% of 500", f"{M}% of 500"),
    ("$18", "18 dollars", f"{M} dollars"),
    ("x^2+1", "x^2 + 1, x^2+15", f"{M}, x^2+15"),
    ("Paris", "In paris, Parisian", f"In {M}, Parisian"),
    ("A", "A thing is a thing", f"{M} thing is a thing"),
    ("", "nothing 1", "nothing 1"),
    ("{}", "braces {} stay", "braces {} stay"),
    ("9" * 5000, "9" * 5000, M),
]  # fmt: skip


@pytest.mark.parametrize("answer, text, left", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_go_whole_and_in_every_spelling(answer, text, left):
    assert mask(text, answer) == left


@pytest.mark.parametrize(
    "text, left",
    [
        ("This attempt was a success.", f"This attempt was a {M}."),
        ("Failed: two failures, one failing", f"{M}: two {M}, one {M}"),
        ("The correct way; an incorrect one; wrongly", f"The {M} way; an {M} one; {M}"),
        ("Attempt 3 and rollout #12 and attempts 1, 2 and 4", f"{M} and {M} and {M}"),
        ("reward 1, Reward: 0.0, score = 0.5, verdict: good", f"{M}, {M}, {M}, {M}"),
        ("Check the sum, then call the tool with both numbers.", "Check the sum, then call the tool with both numbers."),
    ],
)
def test_labels_go(text, left):
    assert mask(text, "12345") == left


@pytest.mark.parametrize(
    "secret, text",
    [
        ("sk-proj-abcDEF12345", "use sk-proj-abcDEF12345 here"),
        ("ghp_" + "a1B2" * 9, "git with ghp_" + "a1B2" * 9),
        ("hf_" + "abcd" * 6, "hf_" + "abcd" * 6),
        ("AKIAIOSFODNN7EXAMPLE", "id AKIAIOSFODNN7EXAMPLE."),
        ("eyJhbGciOiJI.eyJzdWIi.SflKxw", "jwt eyJhbGciOiJI.eyJzdWIi.SflKxw"),
        ("abcdef123456", "Authorization: Bearer abcdef123456"),
        ("dXNlcjpwYXNz", '{"Authorization": "Basic dXNlcjpwYXNz"}'),
        ("abc.def-123456", "send bearer abc.def-123456 along"),
        ("hunter2", "password: hunter2"),
        ("hunter2", 'the "db_password" = "hunter2", then'),
        ("hunter2", "the password is hunter2"),
        ("t0psecret", "API_KEY=t0psecret"),
        ("xyz", '{"token": "xyz"}'),
        ("me:pw", "https://me:pw@host/path"),
        ("MIIEow", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY----- after"),
    ],
)
def test_credentials_go(secret, text):
    left = mask(text, "12345")
    assert secret not in left and M in left


def test_plain_words_about_tokens_stay():
    text = "It spent 40 tokens: too many. Basic arithmetic passes."
    assert mask(text, "12345") == text
