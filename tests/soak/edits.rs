//! A pipeline in Python that is edited under load: each change serves, none of its callers notices, and what raises leaves the version before serving.

use std::time::{Duration, Instant};

use modalkit_tests::{
    Setup,
    load::{Load, Requests},
    python::write,
    wait_until,
};
use serde_json::Value;

const EDITS: u64 = 200;
/// Of so many edits one raises when it is imported.
const RAISES: u64 = 10;
const CONNECTIONS: usize = 16;
const REQUESTS: Requests = Requests {
    path: "/predict_sync?model_name=edited",
    body: "{}",
    statuses: &[200],
    check: |answer| version(answer).ok_or_else(|| format!("expected a version, found {answer}")),
};

fn version(answer: &Value) -> Option<u64> {
    answer["version"].as_u64()
}

fn source(version: u64) -> String {
    format!("def predict(batch):\n    return [{{'version': {version}}} for _ in batch]\n")
}

/// Two hundred.
pub(crate) fn two_hundred() {
    // On a machine that others use as well, a tail of latencies says nothing of a version.
    let config = "[server]\nlog = \"warn,modalkit::app=info\"\n[app_settings.batch_config]\nmax_batch_size = 16\n\
        [app_settings.deployment_config]\nprobation_p99_ratio_max = 1000.0\n";
    let host = Setup::new().python("edited", &[("pipeline.py", &source(1))]).config(config).ready();
    let folder = host.volume().join("edited");
    let load = Load::start(host.address, CONNECTIONS, REQUESTS);
    wait_until("the first version answers", || load.newest() == 1);
    let (mut times, mut raised) = (Vec::new(), 0);
    for number in 2..=EDITS + 1 {
        let edited = Instant::now();
        if number % RAISES == 0 {
            let why = format!("version {number} is none");
            write(&folder, &[("pipeline.py", &format!("raise RuntimeError('{why}')\n"))]);
            wait_until("the host says why it was refused", || {
                host.report("edited")["last"]["reason"].to_string().contains(&why)
            });
            assert_eq!(load.newest(), number - 1, "the version before goes on");
            raised += 1;
        } else {
            write(&folder, &[("pipeline.py", &source(number))]);
            wait_until("the new version answers", || load.newest() == number);
            times.push(edited.elapsed());
        }
    }
    let served = load.stop();
    served.assert_faultless();
    times.sort();
    let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{EDITS} edits at {CONNECTIONS} connections, {} right answers, none wrong, none of an older version; {raised} that raised were refused with their reason",
        served.right
    );
    println!(
        "  from the edit to the first answer: median {:.0} ms, 99th percentile {:.0} ms, longest {:?}",
        at(0.5),
        at(0.99),
        times.last().copied().unwrap_or(Duration::ZERO)
    );
}
