//! Imports form no circle: of two modules of one folder at most one knows the other, however far around. A folder's own file (`mod.rs`,
//! `lib.rs`, `main.rs`) declares and re-exports what is in it, so that its children may name it and it them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use modalkit_tests::workspace;

/// A module's path in its crate.
type Module = Vec<String>;
/// For each module of a folder those that it imports, with the files that show it.
type Graph = BTreeMap<String, BTreeMap<String, String>>;

/// Folders whose files are modules of one crate.
const CRATES: [&str; 11] = [
    "host/src",
    "host/batch/src",
    "host/device/src",
    "host/engine/src",
    "host/journal/src",
    "host/loader/src",
    "host/queue/src",
    "sdk/src",
    "sdk/abi/src",
    "xtask/src",
    "plugins/similarity/src",
];

#[test]
fn imports_form_no_circle() {
    let mut edges = 0;
    for root in CRATES {
        for (folder, graph) in graphs(&workspace().join(root)) {
            edges += graph.values().map(BTreeMap::len).sum::<usize>();
            if let Some(circle) = circle(&graph) {
                panic!("{root}/{}: these import each other: {circle:#?}", folder.join("/"));
            }
        }
    }
    assert!(edges > 200, "only {edges} imports were found");
}

/// For each folder of a crate, which of its modules import which.
fn graphs(root: &Path) -> BTreeMap<Module, Graph> {
    let mut files = BTreeMap::new();
    collect(root, &mut Vec::new(), &mut files);
    let mut graphs: BTreeMap<Module, Graph> = BTreeMap::new();
    for (module, text) in &files {
        for path in paths(text) {
            let Some(target) = resolve(module, &path, &files) else { continue };
            let common = module.iter().zip(&target).take_while(|(a, b)| a == b).count();
            if let (Some(from), Some(to)) = (module.get(common), target.get(common)) {
                let shown = format!("{} imports {}", module.join("/"), path.join("::"));
                let graph = graphs.entry(module[..common].to_vec()).or_default();
                graph.entry(from.clone()).or_default().entry(to.clone()).or_insert(shown);
            }
        }
    }
    graphs
}

/// Every file of a crate by its module, without its tests and comments.
fn collect(folder: &Path, module: &mut Module, files: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            module.push(name);
            collect(&path, module, files);
            module.pop();
        } else if path.extension().is_some_and(|kind| kind == "rs") && name != "tests" {
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
            let mut module = module.clone();
            if !["mod", "lib", "main"].contains(&name.as_str()) {
                module.push(name);
            }
            files.entry(module).or_default().push_str(&code.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// The file that a path leads to; `None` where that is this one, or another crate's.
fn resolve(module: &Module, path: &[String], files: &BTreeMap<Module, String>) -> Option<Module> {
    let (first, rest) = path.split_first()?;
    let mut target = match first.as_str() {
        "crate" | "modalkit" => Module::new(),
        "self" => module.clone(),
        "super" => module.split_last()?.1.to_vec(),
        child => [module.clone(), vec![child.to_owned()]].concat(),
    };
    for step in rest {
        match step.as_str() {
            "super" => drop(target.pop()),
            step => target.push(step.to_owned()),
        }
    }
    while !target.is_empty() && !files.contains_key(&target) {
        target.pop();
    }
    (!target.is_empty() && target != *module).then_some(target)
}

/// The paths of all `use` statements, and those in code that begin with `crate` or `super`.
fn paths(code: &str) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for statement in code.split(';') {
        let uses = statement.rfind("use ").filter(|at| {
            let before = statement[..*at].rsplit('\n').next().unwrap_or_default().trim();
            before.is_empty() || before.starts_with("pub")
        });
        if let Some(at) = uses {
            expand(&[], &statement[at + "use ".len()..], &mut found);
        }
    }
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let is_inside =
                code[..at].ends_with(|before: char| before.is_alphanumeric() || "_:".contains(before));
            if !is_inside {
                let end = code[at..].find(|letter: char| !letter.is_alphanumeric() && !"_:".contains(letter));
                let path = &code[at..end.map_or(code.len(), |end| at + end)];
                found.insert(
                    path.split("::").filter(|step| !step.is_empty()).map(ToOwned::to_owned).collect(),
                );
            }
        }
    }
    found
}

/// Takes `a::{b, c::d}` apart.
fn expand(before: &[String], tree: &str, found: &mut BTreeSet<Vec<String>>) {
    let tree = tree.trim();
    if let Some(inner) = tree.strip_prefix('{') {
        let (mut depth, mut start) = (0, 0);
        let inner = inner.trim_end().trim_end_matches('}');
        for (at, letter) in inner.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(before, &inner[start..at], found);
                    start = at + 1;
                }
                _ => {}
            }
        }
        // The last brace of a nested group went with the outer one.
        expand(before, &format!("{}{}", &inner[start..], "}".repeat(depth.max(0) as usize)), found);
    } else if let Some((first, rest)) = tree.split_once("::").filter(|(first, _)| !first.contains('{')) {
        expand(&[before, &[first.trim().to_owned()]].concat(), rest, found);
    } else if !tree.is_empty() {
        let name = tree.split_whitespace().next().unwrap_or_default();
        found.insert([before, &[name.to_owned()]].concat());
    }
}

/// The imports that form circles, where there are any: what is left when modules are taken away that import nothing of the rest, or that
/// nothing of the rest imports.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    let mut left: BTreeSet<&String> = graph.keys().collect();
    loop {
        let before = left.len();
        let imports =
            |from: &String, to: &String| graph.get(from).is_some_and(|imported| imported.contains_key(to));
        let is_between = |module: &&String| {
            left.iter().any(|other| imports(module, other)) && left.iter().any(|other| imports(other, module))
        };
        let kept: BTreeSet<&String> = left.iter().filter(|module| is_between(module)).copied().collect();
        left = kept;
        if left.is_empty() {
            return None;
        }
        if left.len() == before {
            let of = |module: &&&String| {
                let inside = graph[**module].iter().filter(|(imported, _)| left.contains(imported));
                inside.map(|(_, shown)| shown.clone()).collect::<Vec<_>>()
            };
            return Some(left.iter().flat_map(|module| of(&module)).collect());
        }
    }
}

#[test]
fn a_circle_is_found_and_trees_of_imports_are_taken_apart() {
    let code = "use std::fmt;\nuse crate::{a::{B, c::d}, e};\npub(crate) use super::f::G;\nfn h() { crate::i::j(); }";
    let found: Vec<String> = paths(code).iter().map(|path| path.join("::")).collect();
    let expected = ["crate::a::B", "crate::a::c::d", "crate::e", "crate::i::j", "std::fmt", "super::f::G"];
    for path in expected {
        assert!(found.contains(&path.to_owned()), "{path} is not in {found:?}");
    }
    let edge = |to: &str| BTreeMap::from([(to.to_owned(), format!("imports {to}"))]);
    let mut graph = Graph::from([("a".into(), edge("b")), ("b".into(), edge("c")), ("d".into(), edge("a"))]);
    assert_eq!(circle(&graph), None);
    graph.insert("c".into(), edge("a"));
    assert!(circle(&graph).unwrap().contains(&"imports c".to_owned()));
}
