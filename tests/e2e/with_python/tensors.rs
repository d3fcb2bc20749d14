//! Pipelines in Python that take and give tensors: as arrays by their names, which they may keep, and of libraries other than numpy.

use std::{net::TcpStream, thread};

use modalkit_tests::{Setup, wait_until};
use serde_json::json;

use super::ask;
use crate::tensors::{exchange, head};

const SUMS: &str = r#"
import numpy

class Sums:
    signature = {
        "inputs": {"values": ("FP32", [3]), "word": ("BYTES", [])},
        "outputs": {"sum": ("float64", []), "twice": ("FP32", [None]), "said": ("BYTES", [])},
    }

    def __init__(self):
        self.kept = []

    def predict(self, batch):
        answers = []
        for item in batch:
            values = numpy.asarray(item["values"], dtype="float32")
            self.kept.append((values, values.copy()))
            word = item["word"]
            word = word.item().decode() if hasattr(word, "item") else word
            answers.append({"sum": values.sum(), "twice": values * 2, "said": word + "!"})
        assert all((kept == copy).all() for kept, copy in self.kept)
        return answers
"#;

#[test]
fn tensors_are_arrays_by_their_names_on_the_way_in_and_out() {
    let host = Setup::new()
        .python("sums", &[("pipeline.py", SUMS)])
        .config("[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 5\n")
        .ready();
    wait_until("it serves", || ask(&host, "sums", &json!({"values": [1, 2, 3], "word": "a"})).0 == 200);
    let answer = ask(&host, "sums", &json!({"values": [1, 2, 3.5], "word": "a"})).1;
    assert_eq!(answer, json!({"status": "success", "sum": 6.5, "twice": [2.0, 4.0, 7.0], "said": "a!"}));
    let request = json!({"inputs": [
        {"name": "values", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6.5]},
        {"name": "word", "datatype": "BYTES", "shape": [2], "data": ["x", "y"]},
    ]});
    for _ in 0..100 {
        let (status, answer) = host.post("/v2/models/sums/infer", &request);
        assert_eq!(status, 200, "{answer}");
        let output = |name: &str| {
            answer["outputs"]
                .as_array()
                .unwrap()
                .iter()
                .find(|output| output["name"] == name)
                .unwrap()
                .clone()
        };
        assert_eq!((&output("sum")["data"], &output("sum")["shape"]), (&json!([6.0, 15.5]), &json!([2])));
        assert_eq!(output("twice")["data"], json!([2.0, 4.0, 6.0, 8.0, 10.0, 13.0]));
        assert_eq!(output("said")["data"], json!(["x!", "y!"]));
    }
    let wrong = json!({"inputs": [{"name": "values", "datatype": "INT32", "shape": [1, 3], "data": [1, 2, 3]}, {"name": "word", "datatype": "BYTES", "shape": [1], "data": ["x"]}]});
    let (status, answer) = host.post("/v2/models/sums/infer", &wrong);
    assert!(status == 400 && answer["error"].to_string().contains("FP32"), "{status} {answer}");
}

/// Keeps what it is given, as people do with the last image, a cache or a queue; and answers with what another library holds.
const KEEPER: &str = r#"
import numpy


class Foreign:
    """As a tensor of another library, which numpy knows by DLPack alone."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __dlpack__(self, **settings):
        return self.array.__dlpack__(**settings)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Keeper:
    signature = {
        "inputs": {"values": ("FP32", [None])},
        "outputs": {"sum": ("FP64", []), "changed": ("INT64", []), "aligned": ("BOOL", []), "twice": ("FP32", [None])},
    }

    def __init__(self):
        self.kept, self.number = [], 0

    def predict(self, batch):
        answers = []
        for item in batch:
            values = item["values"]
            self.number += 1
            keeps = self.number == 1 or self.number % 150 == 0
            if keeps:
                # A view of a part keeps all of it.
                self.kept.append((values[7:] if self.number % 300 == 0 else values, float(values[7:].sum())))
            changed = sum(float((kept[7:] if kept.size == values.size else kept).sum()) != said for kept, said in self.kept)
            answers.append(
                {
                    "sum": values.sum(dtype="float64"),
                    "changed": changed,
                    "aligned": values.ctypes.data % 64 == 0 and values.flags.writeable,
                    "twice": Foreign(values[:4] * 2),
                }
            )
            # Its caller's copy is nobody else's.
            if not keeps:
                values[:] = -1
        return answers
"#;

#[test]
fn arrays_that_are_kept_stay_what_they_are_over_a_thousand_batches() {
    // A little more than what goes over the socket.
    const VALUES: usize = 17_000;
    const BATCHES: usize = 1_000;
    let host = Setup::new().python("keeper", &[("pipeline.py", KEEPER)]).ready();
    let head = head("keeper", Some("0"), 4 * VALUES);
    let ask = |stream: &mut TcpStream, number: usize| {
        let bytes: Vec<u8> = (0..VALUES).flat_map(|at| ((at % 7 + number) as f32).to_le_bytes()).collect();
        let (status, headers, answer) = exchange(stream, &head, &bytes);
        // As asked: the bytes of the outputs, one after the other, behind the JSON.
        let json_bytes =
            headers.lines().find_map(|line| line.strip_prefix("inference-header-content-length: "));
        let data = json_bytes.map_or(Vec::new(), |bytes| answer[bytes.parse().unwrap()..].to_vec());
        (status, data)
    };
    wait_until("it serves", || ask(&mut host.connect(), 0).0 == 200);
    // Several at once: the next batch is written as soon as the one before has ended.
    let aligned: usize = thread::scope(|scope| {
        let callers = [0, 1, 2, 3].map(|caller| {
            let (host, ask) = (&host, &ask);
            scope.spawn(move || {
                let (mut stream, mut aligned) = (host.connect(), 0);
                for number in (1 + caller..=BATCHES).step_by(4) {
                    let (status, data) = ask(&mut stream, number);
                    assert_eq!((status, data.len()), (200, 8 + 8 + 1 + 16), "batch {number}");
                    let expected: usize = (0..VALUES).map(|at| at % 7 + number).sum();
                    assert_eq!(data[..8], (expected as f64).to_le_bytes(), "batch {number}");
                    let changed = &data[8..16];
                    assert_eq!(changed, 0_i64.to_le_bytes(), "what was kept has changed by batch {number}");
                    aligned += usize::from(data[16]);
                    let twice: Vec<u8> =
                        (0..4).flat_map(|at| (2.0 * (at + number) as f32).to_le_bytes()).collect();
                    assert_eq!(data[17..], twice);
                }
                aligned
            })
        });
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    // As they lie in memory that the host wrote, and not in copies.
    assert_eq!(aligned, BATCHES);
}
