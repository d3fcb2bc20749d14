//! Pipelines in Python whose outputs come bit by bit: each shape of generator, callers who leave, and callers who read slowly.

use std::thread;

use modalkit_tests::{
    Host, Setup,
    events::{Event, EventStream},
    wait_until,
};
use serde_json::{Value, json};

use super::ask;

/// A step for the whole batch at a time; the outcome is what it returns.
const TOGETHER: &str = r#"
import json
import time


class Speller:
    def predict(self, batch):
        words = [item["word"] for item in batch]
        there = [True for _ in batch]
        sent = [0 for _ in batch]
        for at in range(max(map(len, words))):
            time.sleep(batch[0].get("pause", 0))
            there = yield [{"letter": word[at]} if at < len(word) else None for word in words]
            for place, _ in enumerate(batch):
                sent[place] = at + 1 if there[place] else sent[place]
            with open("there.json", "w") as file:
                json.dump(there, file)
        return [{"word": word, "batch": len(batch)} for word in words]
"#;

/// A generator for each input, of either kind, or an output that is there already.
const EACH: &str = r#"
import asyncio
import time


def spell(word):
    try:
        for letter in word:
            if letter == "!":
                raise ValueError("told to raise")
            yield letter
    finally:
        open("ended-" + word[:3], "w").close()


async def slowly(word):
    for letter in word:
        await asyncio.sleep(0.001)
        yield {"letter": letter}


def pages(word):
    for letter in word:
        yield letter * 50_000


def silent(word):
    open("begun-" + word, "w").close()
    try:
        while True:
            time.sleep(0.01)
            yield None
    finally:
        open("ended-" + word, "w").close()


def predict(batch):
    kinds = {"pages": pages, "silent": silent, "spell": spell, "slowly": slowly, "whole": lambda word: {"whole": word}}
    return [kinds[item["do"]](item["word"]) for item in batch]
"#;

/// What is yielded is no step, but one output after the other; or a step of the wrong length.
const OTHERS: &str = r#"
def predict(batch):
    if batch[0].get("do") == "wrong":
        yield [1, 2, 3, 4, 5, 6, 7]
    for item in batch:
        yield {"said": item["word"]}
"#;

/// Stages, of which the last streams, asynchronously; there is nothing that it could return.
const STAGES: &str = r#"
from modalkit.inference_pipeline import InferencePipeline


class Echo(InferencePipeline):
    def preprocess(self, input_list):
        return [item["word"].split() for item in input_list]

    def predict(self, input_list, preprocessed_data):
        return preprocessed_data

    async def postprocess(self, input_list, raw_output):
        for at in range(max(map(len, raw_output))):
            yield [words[at] + " " if at < len(words) else None for words in raw_output]
"#;

fn host() -> Host {
    let config = "[app_settings.batch_config]\nmax_batch_size = 4\nwait_ms = 20\n[app_settings.deployment_config]\nstream_wait_seconds = 2.0\n";
    let files = |text: &'static str| [("pipeline.py", text)];
    let host = Setup::new()
        .python("speller", &files(TOGETHER))
        .python("each", &files(EACH))
        .python("others", &files(OTHERS))
        .python("stages", &files(STAGES))
        .config(config)
        .start();
    for (model, input) in [
        ("speller", json!({"word": "a"})),
        ("each", json!({"word": "a", "do": "whole"})),
        ("others", json!({"word": "a"})),
        ("stages", json!({"word": "a"})),
    ] {
        wait_until("it serves", || ask(&host, model, &input).0 == 200);
    }
    host
}

fn events(host: &Host, model: &str, input: &Value) -> (Vec<Value>, Value) {
    let events = EventStream::open(host.connect(), model, input, "").rest();
    let (end, chunks) = events.split_last().expect("a stream ends");
    assert_eq!(end.name, "end");
    (chunks.iter().map(Event::json).collect(), end.json())
}

#[test]
fn outputs_come_bit_by_bit_in_each_shape_that_people_write_and_whole_to_others() {
    let host = host();
    let (chunks, end) = events(&host, "speller", &json!({"word": "abc"}));
    assert_eq!(chunks, [json!({"letter": "a"}), json!({"letter": "b"}), json!({"letter": "c"})]);
    assert_eq!(end, json!({"status": "success", "word": "abc", "batch": 1}));
    // Several at once, of different lengths, of which one wants it whole.
    let together: Vec<(Vec<Value>, Value)> = thread::scope(|scope| {
        let asked = ["xy", "uvwxyz", "m"].map(|word| {
            scope.spawn({
                let host = &host;
                move || events(host, "speller", &json!({"word": word}))
            })
        });
        let whole = ask(&host, "speller", &json!({"word": "whole"}));
        assert_eq!((whole.0, &whole.1["word"]), (200, &json!("whole")));
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    for ((chunks, end), word) in together.iter().zip(["xy", "uvwxyz", "m"]) {
        let letters: String = chunks.iter().map(|chunk| chunk["letter"].as_str().unwrap()).collect();
        assert_eq!((letters.as_str(), &end["word"]), (word, &json!(word)));
    }

    let (chunks, end) = events(&host, "each", &json!({"word": "abc", "do": "spell"}));
    assert_eq!(chunks, ["a", "b", "c"]);
    assert_eq!(end, json!({"status": "success", "output": "abc"}), "of chunks that are text");
    let (chunks, end) = events(&host, "each", &json!({"word": "de", "do": "slowly"}));
    assert_eq!(chunks, [json!({"letter": "d"}), json!({"letter": "e"})]);
    assert_eq!(end["output"], json!(chunks), "of others");
    let (_, list) = host.post(
        "/predict_batch?model_name=each",
        &json!([{"word": "ab", "do": "spell"}, {"word": "cd", "do": "whole"}, {"word": "e", "do": "slowly"}]),
    );
    let outputs: Vec<Value> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one.get("output").unwrap_or(&one["whole"]).clone())
        .collect();
    assert_eq!(outputs, [json!("ab"), json!("cd"), json!([{"letter": "e"}])]);
    // What one raises is its caller's alone, after what was there before.
    let (chunks, end) = events(&host, "each", &json!({"word": "no!", "do": "spell"}));
    assert_eq!((chunks.len(), end["status_code"].as_u64()), (2, Some(500)));
    assert!(end["error"].to_string().contains("ValueError: told to raise"), "{end}");

    let (chunks, end) = events(&host, "stages", &json!({"word": "one by one"}));
    assert_eq!(chunks, ["one ", "by ", "one "]);
    assert_eq!(end["output"], "one by one ");
    let (chunks, end) = events(&host, "others", &json!({"word": "x"}));
    assert_eq!((chunks.len(), &end["said"]), (0, &json!("x")));
    let (status, answer) = ask(&host, "others", &json!({"do": "wrong"}));
    let detail = answer["detail"].to_string();
    assert!(
        status == 500 && detail.contains("a chunk for each of 1 inputs") && detail.contains("found 7"),
        "{answer}"
    );
}

#[test]
fn a_generator_is_closed_when_its_callers_have_left_and_waits_for_one_who_reads_slowly() {
    let host = host();
    let mut stream = EventStream::open(
        host.connect(),
        "each",
        &json!({"word": format!("abc{}", "x".repeat(2_000_000)), "do": "spell"}),
        "",
    );
    stream.next_event().unwrap();
    drop(stream);
    let ended = host.volume().join("each/ended-abc");
    wait_until("its generator ended", || ended.exists());
    // Of a batch of which one has left, the others go on.
    let long = json!({"word": "y".repeat(20), "pause": 0.1});
    let mut leaves = EventStream::open(host.connect(), "speller", &long, "");
    let stays = EventStream::open(host.connect(), "speller", &long, "");
    leaves.next_event().unwrap();
    drop(leaves);
    let rest = stays.rest();
    assert_eq!(rest.len(), 21, "every letter, and the end");
    // Of a caller who reads nothing, what was made waits; who is in the same batch has all of it meanwhile.
    let sizes = || host.metric(r#"modalkit_batch_size_items_count{model="each"}"#);
    let before = sizes();
    let sent = |letter: &str| {
        let mut stream = host.connect();
        EventStream::send(&mut stream, "each", &json!({"word": letter.repeat(60), "do": "pages"}), "");
        stream
    };
    let (slow, fast) = (sent("s"), sent("f"));
    let mut fast = EventStream::answer(fast);
    for number in 0..60 {
        assert_eq!(fast.next_event().unwrap().name, "chunk", "{number}");
    }
    assert_eq!(sizes() - before, 1.0, "they are one batch");
    assert_eq!(EventStream::answer(slow).rest().len(), 61);
    // The outcomes of a batch come together.
    assert_eq!(fast.rest().len(), 1);
    // A caller who is sent nothing is missed all the same.
    let mut silent = host.connect();
    EventStream::send(&mut silent, "each", &json!({"word": "qui", "do": "silent"}), "");
    let begun = host.volume().join("each/begun-qui");
    wait_until("its generator runs", || begun.exists());
    drop(silent);
    let ended = host.volume().join("each/ended-qui");
    wait_until("its generator ended", || ended.exists());
}
