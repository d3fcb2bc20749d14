//! Pipelines in Python: a folder in a volume serves, its inputs are what pydantic says, and what its code does harms nobody else.

use std::{fs, thread, time::Duration};

use modalkit_tests::{Host, Setup, python::write, wait_until};
use serde_json::{Value, json};

const SENTIMENT: &str = r#"
import logging
from pydantic import BaseModel, Field
from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Text(BaseModel):
    text: str = Field(max_length=20)
    weight: int = 1


class Label(InferenceOutputModel):
    label: str
    weight: int
    batch: int
    told: dict


class Sentiment(InferencePipeline):
    def __init__(self, model_name, all_model_data_folder, common_settings, *args, **kwargs):
        super().__init__(model_name, all_model_data_folder, common_settings, *args, **kwargs)
        self.told = {"model": model_name, "common": common_settings, **kwargs}
        self.reloads = 0

    def on_volume_reload(self):
        self.reloads += 1

    def preprocess(self, input_list: list[Text]) -> dict:
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list, preprocessed_data):
        if "raise" in preprocessed_data["texts"]:
            raise ValueError("told to raise")
        return ["good" if "good" in text else "bad" for text in preprocessed_data["texts"]]

    def postprocess(self, input_list, raw_output):
        logging.getLogger("sentiment").warning("%d inputs", len(input_list))
        told = {**self.told, "reloads": self.reloads}
        return [
            Label(status="success", label=label, weight=item.weight, batch=len(input_list), told=told)
            for item, label in zip(input_list, raw_output)
        ]
"#;

fn ask(host: &Host, model: &str, body: &Value) -> (u16, Value) {
    host.post(&format!("/predict_sync?model_name={model}"), body)
}

#[test]
fn a_folder_in_a_volume_serves_by_the_librarys_rules() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 20\n\
         [model_settings.common]\nlanguage = \"en\"\n\
         [model_settings.model_entries.sentiment]\nthreshold = 0.5\n";
    let host = Setup::new().python("sentiment", &[("pipeline.py", SENTIMENT)]).config(config).ready();
    let (status, answer) = ask(&host, "sentiment", &json!({"text": "a good day", "weight": "7"}));
    assert_eq!(status, 200, "{answer}");
    let told = json!({"model": "sentiment", "common": {"language": "en"}, "threshold": 0.5, "reloads": 0});
    assert_eq!(answer, json!({"status": "success", "label": "good", "weight": 7, "batch": 1, "told": told}));
    let line = host.log_line("1 inputs");
    assert_eq!(
        (&line["level"], &line["model"], &line["from"]),
        (&json!("WARN"), &json!("sentiment"), &json!("sentiment"))
    );

    // Pydantic's own words.
    let (status, answer) = ask(&host, "sentiment", &json!({"text": "x".repeat(21), "weight": "a"}));
    assert_eq!(status, 422, "{answer}");
    let of = |at: usize| (answer["detail"][at]["loc"].clone(), answer["detail"][at]["type"].clone());
    assert_eq!(of(0), (json!(["body", "text"]), json!("string_too_long")));
    assert_eq!(of(1), (json!(["body", "weight"]), json!("int_parsing")));
    assert_eq!(answer["detail"][0]["msg"], "String should have at most 20 characters");

    // One that raises among others, one that is invalid, and a list of which one is.
    let items: Vec<Value> = (0..32)
        .map(|place| match place {
            3 => json!({"text": 3}),
            17 => json!({"text": "raise"}),
            _ => json!({"text": format!("good {place}")}),
        })
        .collect();
    let answers: Vec<(u16, Value)> = thread::scope(|scope| {
        let asked: Vec<_> = items.iter().map(|item| scope.spawn(|| ask(&host, "sentiment", item))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    for (place, (status, answer)) in answers.iter().enumerate() {
        let expected =
            [(3, 422), (17, 500)].iter().find(|(at, _)| *at == place).map_or(200, |(_, status)| *status);
        assert_eq!(*status, expected, "{place}: {answer}");
    }
    assert!(
        answers[17].1["detail"].as_str().unwrap().contains("ValueError: told to raise"),
        "{:?}",
        answers[17]
    );
    let traceback = host.logged("the traceback", |line| line["message"].to_string().contains("Traceback"));
    let text = traceback["message"].as_str().unwrap();
    assert!(text.contains("pipeline.py\", line") && !text.contains("modalkit_worker"), "{text}");
    let (status, answer) = host.post("/predict_batch?model_name=sentiment", &json!(items[..4]));
    assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["body", 3, "text"])), "{answer}");

    let job = host.job("sentiment", &json!({"message": {"text": "good"}}));
    assert_eq!(host.ended(&job)["result"]["label"], "good");
    fs::write(host.volume().join("sentiment/words.txt"), "x").unwrap();
    wait_until("the hook ran", || ask(&host, "sentiment", &json!({"text": ""})).1["told"]["reloads"] == 1);
}

#[test]
fn other_shapes_of_code_serve_and_a_users_module_is_in_nobodys_way() {
    let function = "import numpy\n\ndef predict(batch):\n    return [{'sum': numpy.sum(item['numbers'])} for item in batch]\n";
    let asynchronous = "import asyncio\nimport struct\n\nclass Model:\n    def __init__(self, greeting='hello'):\n        self.greeting = greeting\n\n    async def predict(self, batch):\n        await asyncio.sleep(0)\n        return [{'said': f\"{self.greeting} {item['name']} {struct.WORD}\"} for item in batch]\n";
    let config = "[model_settings.model_entries.greeter]\ngreeting = \"hi\"\n[model_settings.model_entries.greeter.python]\npipeline = \"inside.model:Model\"\n";
    let host = Setup::new()
        .python("adder", &[("pipeline.py", function)])
        .python(
            "greeter",
            // It hides the standard library's from nobody but the user's own code, which may have it so.
            &[("pipeline.py", ""), ("inside/model.py", asynchronous), ("struct.py", "WORD = 'mine'\n")],
        )
        .config(config)
        .start();
    wait_until("the first serves", || ask(&host, "adder", &json!({"numbers": [1, 2.5]})).0 == 200);
    assert_eq!(ask(&host, "adder", &json!({"numbers": [1, 2.5]})).1["sum"], 3.5);
    wait_until("the second has an end", || host.model("greeter")["state"] != "loading");
    // `struct` was imported before the folder was looked into.
    let reason = host.model("greeter")["reason"].to_string();
    let (status, answer) = ask(&host, "greeter", &json!({"name": "Ann"}));
    assert_eq!(status, 500, "{reason} {answer}");
    assert!(answer["detail"].as_str().unwrap().contains("AttributeError"), "{answer}");
    write(
        &host.volume().join("greeter"),
        &[("inside/model.py", &asynchronous.replace("{struct.WORD}", "!"))],
    );
    wait_until("the change serves", || {
        ask(&host, "greeter", &json!({"name": "Ann"})).1["said"] == "hi Ann !"
    });
}

#[test]
fn changed_code_is_a_new_generation_and_one_that_raises_leaves_the_old_one_serving() {
    let version = |number: u32| {
        format!(
            "from helper import WORD\n\ndef predict(batch):\n    return [{{'version': {number}, 'word': WORD}} for _ in batch]\n"
        )
    };
    let files: [(&str, &str); 2] = [("pipeline.py", &version(1)), ("helper.py", "WORD = 'a'\n")];
    let host = Setup::new().python("counter", &files).ready();
    let folder = host.volume().join("counter");
    let served = || ask(&host, "counter", &json!({})).1;
    wait_until("the first serves", || served()["version"] == 1);
    write(&folder, &[("pipeline.py", &version(2)), ("helper.py", "WORD = 'b'\n")]);
    wait_until("the second serves", || served()["version"] == 2);
    assert_eq!(served()["word"], "b");
    write(&folder, &[("helper.py", "raise RuntimeError('not today')\n")]);
    wait_until("it was refused", || {
        let last = host.report("counter")["last"].clone();
        last["reason"].to_string().contains("RuntimeError: not today")
    });
    let reason = host.report("counter")["last"]["reason"].to_string();
    assert!(reason.contains("helper.py") && reason.contains("line 1"), "{reason}");
    assert_eq!(served()["version"], 2);
    write(&folder, &[("helper.py", "WORD = 'c'\n")]);
    wait_until("a fit one serves", || served()["word"] == "c");
    let back = host.post("/models/counter/rollback", &json!({}));
    assert_eq!(back.0, 200, "{back:?}");
    assert_eq!(served()["word"], "b", "of its own copy");
}

#[test]
fn code_that_ends_its_process_or_hangs_costs_its_own_caller_alone() {
    let killer = "import ctypes, os, sys, time\n\ndef deep(n):\n    return deep(n + 1)\n\ndef predict(batch):\n    for item in batch:\n        what = item.get('do')\n        if what == 'segfault':\n            ctypes.string_at(0)\n        elif what == 'leave':\n            print('last words')\n            os._exit(3)\n        elif what == 'exit':\n            sys.exit('no more')\n        elif what == 'hang':\n            time.sleep(60)\n        elif what == 'recursion':\n            deep(0)\n        elif what == 'print':\n            print('x' * 3_000_000)\n        elif what == 'child' and os.fork() == 0:\n            os.setsid()\n            time.sleep(600)\n    return [{'value': 2 * item['value']} for item in batch]\n";
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 30\n[app_settings.deployment_config]\nbatch_timeout_seconds = 1.0\n";
    let mut host = Setup::new().python("killer", &[("pipeline.py", killer)]).config(config).ready();
    wait_until("it serves", || ask(&host, "killer", &json!({"value": 1})).0 == 200);
    for (what, expected) in [
        ("segfault", "SIGSEGV"),
        ("leave", "exit"),
        ("exit", "SystemExit: no more"),
        ("hang", "batch_timeout_seconds"),
        ("recursion", "RecursionError"),
    ] {
        let before = host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#);
        let items: Vec<Value> =
            (0..8).map(|value| json!({"value": value, "do": if value == 5 { what } else { "" }})).collect();
        let answers: Vec<(u16, Value)> = thread::scope(|scope| {
            let asked: Vec<_> = items.iter().map(|item| scope.spawn(|| ask(&host, "killer", item))).collect();
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        for (value, (status, answer)) in answers.iter().enumerate() {
            if value == 5 {
                assert!(
                    *status >= 500 && answer["detail"].to_string().contains(expected),
                    "{what}: {status} {answer}"
                );
            } else {
                assert_eq!((*status, &answer["value"]), (200, &json!(2 * value)), "{what}: {answer}");
            }
        }
        let deaths = host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#) - before;
        assert!(deaths <= 2.0, "{what}: {deaths} deaths");
    }
    let _ = host.log_line("last words");
    let _ = host.logged("the stack at the fault", |line| line["message"].to_string().contains("Fatal Python error"));
    for what in ["print", "child"] {
        assert_eq!(ask(&host, "killer", &json!({"value": 4, "do": what})).1["value"], 8, "{what}");
    }
    let interpreters = || {
        let commands = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        let mark = host_folder(&host);
        commands.filter(|line| String::from_utf8_lossy(line).contains(&mark)).count()
    };
    assert!(interpreters() >= 2, "an interpreter, and its child");
    host.kill();
    thread::sleep(Duration::from_secs(1));
    let commands = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let mark = host_folder(&host);
    assert_eq!(
        commands.filter(|line| String::from_utf8_lossy(line).contains(&mark)).count(),
        0,
        "a second later"
    );
}

/// What the command lines of a host's interpreters have in common.
fn host_folder(host: &Host) -> String {
    host.temporary_folder().join("modalkit-plugins-").display().to_string()
}
