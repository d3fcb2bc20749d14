//! What others than callers may not choose: pages in browsers ask a host without keys for nothing, and jobs name allowed queues only.

use modalkit_tests::{Host, KEY, Setup, brokers, wait_until};
use serde_json::{Value, json};

/// Every endpoint there is, method and path.
const ENDPOINTS: [(&str, &str); 20] = [
    ("POST", "/predict_sync"),
    ("POST", "/predict_batch"),
    ("POST", "/predict_async"),
    ("GET", "/jobs"),
    ("GET", "/jobs/a"),
    ("DELETE", "/jobs/a"),
    ("POST", "/jobs/a/redeliver"),
    ("GET", "/queues"),
    ("DELETE", "/queues/r"),
    ("GET", "/health"),
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/models"),
    ("GET", "/models/echo"),
    ("POST", "/models/echo/reload"),
    ("POST", "/volumes/test/reload"),
    ("GET", "/config"),
    ("POST", "/config/reload"),
    ("GET", "/nowhere"),
];

fn ask(host: &Host, method: &str, path: &str, body: &Value, headers: &[(&str, &str)]) -> (u16, Value) {
    match method {
        "GET" => host.get_with(path, headers),
        "DELETE" => host.delete_with(path, headers),
        _ => host.post_with(path, body, headers),
    }
}

#[test]
fn pages_of_other_sites_ask_a_host_without_keys_for_nothing() {
    let host = Setup::new().plugin("echo").ready();
    let envelope = json!({"message": {"text": "a"}, "success_queue": "r"});
    let foreign = [
        [("origin", "http://evil.test"), ("content-type", "text/plain")],
        [("origin", "null"), ("content-type", "text/plain")],
        [("sec-fetch-site", "cross-site"), ("content-type", "text/plain")],
        // A name that a page's owner has made lead to this machine.
        [("host", "evil.test"), ("content-type", "application/json")],
        [("host", "evil.test"), ("origin", "http://evil.test")],
    ];
    for headers in &foreign {
        for (method, path) in ENDPOINTS {
            let (status, answer) = ask(&host, method, path, &envelope, headers);
            assert_eq!(status, 403, "{method} {path} {headers:?}: {answer}");
            let detail = answer["detail"].as_str().unwrap();
            assert!(detail.contains("expected") && detail.contains("found"), "{detail}");
        }
    }
    assert_eq!(host.get_with("/jobs", &[]).1["jobs"], json!([]), "no job was taken");
    let own = format!("http://{}", host.address);
    let same_site: [&[(&str, &str)]; 4] = [
        &[],
        &[("origin", &own), ("sec-fetch-site", "same-origin")],
        &[("sec-fetch-site", "none")],
        &[("host", "localhost")],
    ];
    for headers in same_site {
        assert_eq!(host.post_with("/predict_async", &envelope, headers).0, 200, "{headers:?}");
    }
}

#[test]
fn further_names_are_allowed_by_the_configuration_and_keys_need_none() {
    let host = Setup::new().plugin("echo").config("[server]\nallowed_hosts = [\"models.test\"]\n").ready();
    let ask = |host: &Host, headers: &[(&str, &str)]| {
        host.post_with("/predict_sync", &json!({"text": "a"}), headers).0
    };
    assert_eq!(ask(&host, &[("host", "models.test"), ("origin", "https://models.test")]), 200);
    assert_eq!(ask(&host, &[("host", "evil.test")]), 403);
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let host = Setup::new().plugin("echo").config(&auth).ready();
    let foreign = [("host", "any.test"), ("origin", "http://any.test"), ("x-api-key", KEY)];
    assert_eq!((ask(&host, &foreign), ask(&host, &foreign[..2])), (200, 401), "a page has no key to show");
}

#[test]
fn a_list_names_queues_of_backends_that_there_are() {
    for (list, config) in [
        (
            "queue_config.allowed_queues",
            "[app_settings.queue_config]\nallowed_queues = [\"memory://a\", \"nowhere://a\"]\n",
        ),
        (
            "keys.ci.allowed_queues",
            "[app_settings.auth_config.keys.ci]\napi_key = \"k\"\nallowed_queues = [\"a\", \"nowhere://a\"]\n",
        ),
    ] {
        let (_, said) = Setup::new().config(config).refuses_to_start();
        assert!(said.contains(&format!("{list}[1]")) && said.contains("nowhere://a"), "{said}");
    }
}

/// What needs Redis.
mod with_redis {
    use super::*;

    /// Every key that Redis holds.
    fn keys(port: u16) -> Vec<String> {
        let mut keys: Vec<String> =
            redis::cmd("KEYS").arg("*").query(&mut brokers::redis_connection(port)).unwrap();
        keys.sort();
        keys
    }

    fn delivered(host: &Host, headers: &[(&str, &str)], answer: &(u16, Value)) {
        assert_eq!(answer.0, 200, "{}", answer.1);
        let path = format!("/jobs/{}", answer.1["job_id"].as_str().unwrap());
        // From a queue in memory somebody has to take it first.
        wait_until("it is delivered, or waits in memory", || {
            let delivery = host.get_with(&path, headers).1["delivery"].clone();
            let queue = delivery["queue"].as_str().unwrap_or_default();
            let held = || {
                host.get(&format!("/queues/{}", queue.trim_start_matches("memory://"))).1["length"].clone()
            };
            delivery["state"] == "delivered" || held().as_u64().is_some_and(|length| length > 0)
        });
    }

    #[test]
    fn a_queue_that_is_not_allowed_is_neither_written_nor_made() {
        let mut redis = brokers::redis(&[]);
        redis.start();
        let backend = format!(
            "[app_settings.queue_config.backends.main]\nkind = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\n",
            redis.port
        );
        let send = |host: &Host, queues: Value, headers: &[(&str, &str)]| {
            let mut envelope = json!({"message": {"text": "a"}});
            envelope.as_object_mut().unwrap().extend(queues.as_object().unwrap().clone());
            host.post_with("/predict_async", &envelope, headers)
        };
        // Where nothing is said: what is in memory, and what is configured.
        let named = format!("[app_settings.queue_config.queues]\nresults = \"main\"\n{backend}");
        let host = Setup::new().plugin("echo").config(&named).ready();
        for queue in ["main://session:admin", "main://", "main://results2"] {
            for member in ["success_queue", "failure_queue"] {
                let (status, answer) = send(&host, json!({member: queue}), &[]);
                assert_eq!(
                    (status, &answer["detail"][0]["loc"][1]),
                    (422, &json!(member)),
                    "{queue}: {answer}"
                );
            }
        }
        let (_, answer) = send(&host, json!({"success_queue": "main://session:admin"}), &[]);
        let said = answer["detail"][0]["msg"].as_str().unwrap();
        assert!(
            said.contains("results") && said.contains("app_settings.queue_config.allowed_queues"),
            "{said}"
        );
        for queue in ["any", "memory://any", "results", "main://results"] {
            delivered(&host, &[], &send(&host, json!({"success_queue": queue}), &[]));
        }
        assert_eq!(keys(redis.port), ["results"]);
        drop(host);

        // A list for all, and a key's own.
        let lists = format!(
            "[app_settings.queue_config]\nallowed_queues = [\"main://team-*\"]\n{backend}[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\nallowed_queues = [\"main://own\"]\n[app_settings.auth_config.keys.two]\napi_key = \"another\"\n"
        );
        let mut host = Setup::new().plugin("echo").config(&lists).ready();
        let (one, two) = ([("x-api-key", KEY)], [("x-api-key", "another")]);
        let first = send(&host, json!({"success_queue": "main://own"}), &one);
        delivered(&host, &one, &first);
        delivered(&host, &two, &send(&host, json!({"success_queue": "main://team-b"}), &two));
        for (queue, headers) in [("main://team-a", &one), ("main://own", &two), ("memory://any", &two)] {
            assert_eq!(send(&host, json!({"success_queue": queue}), headers).0, 422, "{queue} {headers:?}");
        }
        assert_eq!(keys(redis.port), ["own", "results", "team-b"]);
        // A list that has become shorter counts for what is sent again, whoever asks for it.
        let again = format!("/jobs/{}/redeliver", first.1["job_id"].as_str().unwrap());
        assert_eq!(host.post_with(&again, &json!({}), &one).0, 202);
        wait_until("it is there twice", || brokers::redis_list(redis.port, "own").len() == 2);
        host.configure(&lists.replace("main://own", "main://other"));
        assert_eq!(host.post("/config/reload", &json!({})).0, 200);
        let socket = host.socket.clone().unwrap();
        wait_until("the second is on its way no more", || {
            let (status, said) = modalkit_tests::management::request(&socket, "POST", &again, "").unwrap();
            status == 409 && said.contains("keys.one.allowed_queues")
        });
        assert_eq!(host.post_with(&again, &json!({}), &one).0, 409);
        assert_eq!(brokers::redis_list(redis.port, "own").len(), 2);
    }

    #[test]
    fn a_message_names_allowed_queues_only() {
        let mut redis = brokers::redis(&[]);
        redis.start();
        let config = format!(
            "[app_settings.queue_config]\nbackend = \"main\"\ndead_letter_queue = \"dead\"\nallowed_queues = [\"results\", \"bad\"]\n\
             [app_settings.queue_config.backends.main]\nkind = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\nredis_type = \"stream\"\n\
             [[app_settings.queue_config.consume]]\nqueue = \"requests\"\nmodel = \"echo\"\n",
            redis.port
        );
        let host = Setup::new().plugin("echo").config(&config).ready();
        let mut connection = brokers::redis_connection(redis.port);
        let mut add = |queues: Value| {
            let mut envelope = json!({"message": {"text": "a"}});
            envelope.as_object_mut().unwrap().extend(queues.as_object().unwrap().clone());
            let _: String = brokers::xadd(&mut connection, "requests", &envelope.to_string());
        };
        add(json!({"success_queue": "results"}));
        add(json!({"success_queue": "elsewhere", "failure_queue": "bad"}));
        add(json!({"success_queue": "results", "failure_queue": "elsewhere"}));
        let bodies = |queue: &str| brokers::redis_stream(redis.port, queue).len();
        wait_until("each has gone its way", || {
            (bodies("results"), bodies("bad"), bodies("dead")) == (1, 1, 1)
        });
        assert_eq!(keys(redis.port), ["bad", "dead", "requests", "results"]);
        let (refused, _) = &brokers::redis_stream(redis.port, "bad")[0];
        let refused: Value = serde_json::from_slice(refused).unwrap();
        assert!(refused["error"].as_str().unwrap().contains("allowed_queues"), "{refused}");
        drop(host);
    }
}
