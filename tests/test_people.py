"""Words about people put into captions: what is left alone, what is put in, how often, and lists that are none."""

import json
import re
from collections import Counter

import pytest

from cogview.demo.workers import WORK
from cogview.people.specify import specify
from cogview.people.words import LIST, People

EN, ZH = {"Asian", "black", "white", "Latino"}, {"亚裔", "非裔", "白人", "拉丁裔"}


@pytest.mark.parametrize(
    "caption",
    [
        "a fox above a tree",
        "a snowman",
        "a black Asian male doctor",
        "an Asian woman",
        "a Japanese boy with his dog",
        "雪人旁边的机器人",
        "一位亚裔女医生",
        "黑人男孩",
        "白人女医生",
        "一张双人床",
        "人行横道",
        "人类的未来",
        "a king size bed",
        "a Latina doctor",
        "a Nigerian woman",
        "a man from Lagos",
        "a man of African descent",
        "a Klingon man",
        "a brown-skinned woman",
        "a mixed-race girl",
        "a nonbinary Asian person",
        "尼日利亚女人",
        "外国男游客",
        "a king penguin",
        "a clock face",
        "a dog with a funny face",
        "一名学生证",
        "小狗的脸",
        "the Asian driver is female",
        "医生是亚裔女的",
        "",
    ],
)
def test_captions_that_tell_all_or_nothing_of_people_stay(caption):
    assert {specify(caption, seed) for seed in range(20)} == {caption}


@pytest.mark.parametrize(
    ("caption", "begins", "ends"),
    [
        ("a doctor in a garden", ("a", "an"), " doctor in a garden"),
        ("A person in a black coat", ("A", "An"), " person in a black coat"),
        ("a black and white photo of an old farmer", ("a black and white photo of an old",), " farmer"),
        ("the police officer", ("the",), " police officer"),
    ],
)
def test_an_attribute_of_each_kind_stands_before_the_noun(caption, begins, ends):
    for seed in range(20):
        found = specify(caption, seed)
        start = next(b for b in sorted(begins, key=len, reverse=True) if found.startswith(f"{b} "))
        assert found.endswith(ends)
        ethnicity, gender = found[len(start) : -len(ends)].split()
        assert ethnicity in EN
        assert gender in ("male", "female")
        assert len(begins) == 1 or start.endswith("n") == (ethnicity[0] in "AEIOU")


def test_what_a_caption_tells_of_one_person_is_left_alone_and_others_get_their_words():
    told = [specify("a male nurse helps a patient", seed).split() for seed in range(30)]
    assert all(words[1] == "male" and words[2] in EN and words[3] == "nurse" for words in told)
    assert {words[-2] for words in told} == {"male", "female"}
    assert all(specify("a tall woman", seed).split()[2] in EN for seed in range(5))  # a woman is no male one
    assert all(specify("a doctor washes her hands", seed).split()[1] in EN for seed in range(5))
    assert all(specify("a doctor washes her hands", seed).split()[2] == "doctor" for seed in range(5))


@pytest.mark.parametrize(
    ("caption", "pattern"),
    [
        ("a woman doctor", "an? E woman doctor"),
        ("a baby boy on a bed", "an? E baby boy on a bed"),
        ("a patient man", "an? E patient man"),
        ("the driver is female", "the E driver is female"),
        ("a doctor who is a woman", "an? E doctor who is a woman"),
        ("this is a doctor", "this is an? E G doctor"),
        ("a man cooks in a kitchen", "an? E man cooks in a kitchen"),
        ("people cook dinner", "E G people cook dinner"),
        ("two babies", "two E G babies"),
        ("a white-haired woman", "a white-haired E woman"),
        ("an African-American pilot", "an African-American G pilot"),
        ("a Dutch cook", "a Dutch G cook"),
        ("an African elephant and a man", "an African elephant and an? E man"),
        ("a man in a Mexican hat", "an? E man in a Mexican hat"),
        ("A Tall Man In A Hat", "A Tall E Man In A Hat"),
        ("Young man", "Young E man"),
        ("a face, photo", "an? E G face, photo"),
        ("a tennis player", "an? E G tennis player"),
        ("a business man", "an? E business man"),
        ("一张脸，照片", "一张EG脸，照片"),
        ("网球运动员", "EG网球运动员"),
        ("女飞行员", "E女飞行员"),
        ("小男孩", "E小男孩"),
        ("客人", "EG客人"),
        ("工作人员", "EG工作人员"),
        ("一个人在弹吉他", "一个EG在弹吉他"),
        ("骑车的人", "骑车的EG"),
        ("医生是女的", "E医生是女的"),
        ("一个黑人在走路", "一个G黑人在走路"),
    ],
)
def test_a_run_of_nouns_is_one_person_and_what_is_said_of_it_is_told(caption, pattern):
    ethnicity, gender = "|".join([*EN, *ZH]), "male|female|男性|女性"
    pattern = re.sub(r"\bE|E(?=G|医|客|女|小)", f"({ethnicity})", pattern)
    pattern = re.sub(r"G", f"({gender})", pattern)
    for seed in range(12):
        assert re.fullmatch(pattern, specify(caption, seed)), specify(caption, seed)


def test_chinese_captions_get_chinese_words():
    for seed in range(20):
        found = specify("花园里的医生", seed)
        assert found.startswith("花园里的")
        assert found.endswith("性医生")
        assert any(word in found for word in ZH)
    assert {specify("女医生", seed)[:-3] for seed in range(40)} == ZH
    assert all(specify("一位日本老师", seed) in ("一位日本男性老师", "一位日本女性老师") for seed in range(5))
    assert all(
        "人在" not in specify("一个人在骑车", seed) or "裔" in specify("一个人在骑车", seed) for seed in range(5)
    )
    assert specify("一个人在骑车", 1).endswith("性在骑车")


def test_the_same_seed_puts_in_the_same_words_and_all_seeds_the_proportions_of_the_list():
    assert [specify("a nurse", seed) for seed in range(50)] == [specify("a nurse", seed) for seed in range(50)]
    counts = Counter(word for seed in range(4000) for word in specify("a nurse", seed).split())
    for of in People.load().attributes.values():
        for word, share in of.items():
            assert abs(counts[word] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_a_list_of_ones_own(tmp_path):
    own = json.loads(LIST.read_text(encoding="utf-8"))
    own["attributes"] = {"age": {"young": 1, "old": 3}}
    own["zh"], own["specified"] = {"young": "年轻", "old": "年老"}, {"age": {"en": ["teenage"], "zh": []}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    people = People.load(tmp_path / "own.json")
    counts = Counter(specify("a guard", seed, people) for seed in range(400))
    assert set(counts) == {"a young guard", "an old guard"}
    assert counts["an old guard"] > 250
    assert specify("a teenage guard", 0, people) == "a teenage guard"
    assert specify("卫兵", 0, people) in ("年轻卫兵", "年老卫兵")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attributes": {}}, "at least one attribute"),
        ({"attributes": {"age": {"young": 0}}}, "age: expected words and positive numbers"),
        ({"attributes": {"age": {"young": True}}}, "age: expected words and positive numbers"),
        ({"zh": {}}, "its Chinese"),
        ({"nouns": {"en": "doctor"}}, "nouns: expected lists of words"),
        ({"nouns": None}, "an object with attributes, zh"),
        ({"specified": {"gender": ["x"]}}, "specified: gender: expected lists of words by language"),
        ({"specified": {"gendre": {}}}, r"specified: expected attributes \(ethnicity, gender\), got 'gendre'"),
        ({"nouns": {"EN": ["doctor"]}}, "nouns: expected lists of words by language, en and zh"),
        ({"nouns": {"en": ["player of a game"]}}, "expected English nouns of at most 3 words, got 'player of a game'"),
        ({"attributes": {"age": {"": 1}}}, "age: expected words and positive numbers"),
        ({"attributes": {"age": {"young": 10**400}}}, "age: expected words and positive numbers"),
        ({"attributes": {"age": {"young": 1}}, "zh": {"young": " "}}, "zh: young: expected its Chinese"),
    ],
)
def test_a_list_that_is_none_is_refused_in_a_sentence(tmp_path, change, sentence):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(json.loads(LIST.read_text(encoding="utf-8")) | change))
    with pytest.raises(ValueError, match=sentence):
        People.load(path)


def test_files_that_are_no_json_are_refused(tmp_path):
    for text in ("{", "[" * 100_000):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(ValueError, match="is no JSON"):
            People.load(tmp_path / "own.json")
    with pytest.raises(ValueError, match="cannot read"):
        People.load(tmp_path / "none.json")


def test_the_work_of_the_study_is_known_in_both_languages():
    for name, chinese in WORK.items():
        for caption in (f"a {name.replace('-', ' ')}", chinese):
            assert specify(caption, 0) != caption
