//! Parameters and inputs: takes given values, or defaults, and reports missing ones.

use std::collections::BTreeMap;

use super::context::{Elaborator, Request, Vars};
use crate::diagnostic::{Code, Diagnostic};
use crate::load;
use crate::resolve::{At, Configuration, Declarations, Input};
use crate::source::{FileRef, SourceId, Span};
use crate::syntax::{Arg, Node, Range, Scalar};
use crate::template::{Rendered, Scope};
use crate::value::{self, InputType, Value};

fn find<'a, 'd>(declarations: &'a Declarations<'d>, name: &str) -> Option<&'a Input<'d>> {
    declarations.params.iter().find(|param| param.at.name() == name)
}

fn names<'a>(declarations: &'a Declarations) -> impl Iterator<Item = &'a str> {
    declarations.params.iter().map(|param| param.at.name())
}

impl Elaborator<'_> {
    /// The values of the parameters. With `open`, also returns the names of those
    /// that have none, instead of reporting them.
    pub(super) fn params(
        &mut self,
        declarations: &Declarations,
        request: &Request,
        open: bool,
    ) -> (Vars, Vec<String>) {
        let mut unset = Vec::new();
        let mut given: BTreeMap<String, Value> = BTreeMap::new();
        if let Some((name, text)) = &request.values {
            let source = self.sources.add_new(name.clone(), text.as_str());
            match crate::syntax::parse(source, text) {
                Err(errors) => self.out.extend(errors),
                Ok(document) => {
                    for node in &document.nodes {
                        self.read_value(node, source, declarations, &mut given);
                    }
                }
            }
        }
        for (name, text) in request.set {
            let Some(param) = find(declarations, name) else {
                self.out.push(
                    Diagnostic::global(Code::UnknownParam, format!("there is no parameter `{name}`"))
                        .suggest(name, names(declarations))
                        .help_if_none("declare it with `param`"),
                );
                continue;
            };
            match param.ty.parse(text) {
                Ok(value) => {
                    given.insert(name.clone(), value);
                }
                Err(why) => self.out.push(
                    Diagnostic::error(
                        Code::InvalidValue,
                        param.at.head(),
                        format!("invalid value `{text}` for the parameter `{name}`"),
                    )
                    .help(why),
                ),
            }
        }
        let mut vars = Vars::new();
        for param in &declarations.params {
            let value = given.remove(param.at.name()).or_else(|| self.default(param, &vars));
            match value {
                Some(value) => {
                    vars.insert(value::template_name(param.at.name()), value);
                }
                None if param.default().is_some() => {}
                None if open => {
                    let name = param.at.name();
                    unset.push(name.to_owned());
                    vars.insert(value::template_name(name), Value::open(name));
                }
                None => self.out.push(
                    Diagnostic::error(
                        Code::MissingParam,
                        param.at.head(),
                        format!("the parameter `{}` has no value", param.at.name()),
                    )
                    .help(format!("set it with `--set {}=...`, or add a default", param.at.name())),
                ),
            }
        }
        (vars, unset)
    }

    /// Reads the value of a parameter from a node of a file of values.
    fn read_value(
        &mut self,
        node: &Node,
        source: SourceId,
        declarations: &Declarations,
        given: &mut BTreeMap<String, Value>,
    ) {
        let span = |r: &Range| Span { source, start: r.start, end: r.end };
        let Some(param) = find(declarations, &node.name) else {
            self.out.push(
                Diagnostic::error(
                    Code::UnknownParam,
                    span(&node.name_range),
                    format!("there is no parameter `{}`", node.name),
                )
                .suggest(&node.name, names(declarations)),
            );
            return;
        };
        let base = FileRef::project("");
        let place = ValuePlace { source, base: &base, span: span(&node.head_range) };
        if let Some(value) = self.value(&node.args, param.ty, &place, &Scope::default())
            && given.insert(node.name.clone(), value).is_some()
        {
            let message = format!("`{}` is given twice", node.name);
            self.out.push(
                Diagnostic::error(Code::Duplicate, span(&node.name_range), message)
                    .help("remove one of them"),
            );
        }
        if let Some(prop) = node.props.first() {
            let message = format!("`{}` takes arguments, not properties", node.name);
            self.out.push(
                Diagnostic::error(Code::UnknownProperty, span(&prop.name_range), message)
                    .help(format!("write `{} VALUE`", node.name)),
            );
        }
    }

    fn default(&mut self, input: &Input, vars: &Vars) -> Option<Value> {
        let args = input.default()?;
        let place =
            ValuePlace { source: input.at.loaded.source, base: &input.at.loaded.file, span: input.at.head() };
        self.value(args, input.ty, &place, &Scope::new(vars.clone()))
    }

    /// The inputs of a layer: given values, else those of the replaced provider (`were`),
    /// else defaults. `None` after a mistake.
    pub(super) fn inputs(
        &mut self,
        at: At,
        configuration: &Configuration,
        were: &Vars,
        params: &Vars,
    ) -> Option<Vars> {
        let before = self.out.len();
        let scope = Scope::new(params.clone());
        let mut given: BTreeMap<&str, Value> = BTreeMap::new();
        // `with` and `by` are properties of `replace` itself, not inputs.
        let own = |name: &str| at.node.name == "replace" && matches!(name, "with" | "by");
        let props = at.node.props.iter().filter(|p| !own(&p.name));
        let props = props.map(|p| (p.name.as_str(), &p.name_range, std::slice::from_ref(&p.arg)));
        let children = at.node.children().map(|c| (c.name.as_str(), &c.name_range, c.args.as_slice()));
        for (name, range, args) in props.chain(children) {
            let Some(input) = configuration.inputs.iter().find(|i| i.at.name() == name) else {
                self.out.push(
                    Diagnostic::error(
                        Code::UnknownInput,
                        at.span(range),
                        format!("`{}` has no input `{name}`", configuration.at.name()),
                    )
                    .suggest(name, configuration.inputs.iter().map(|i| i.at.name()))
                    .help_if_none("it has no inputs"),
                );
                continue;
            };
            let place = ValuePlace { source: at.loaded.source, base: &at.loaded.file, span: at.span(range) };
            if let Some(value) = self.value(args, input.ty, &place, &scope)
                && given.insert(name, value).is_some()
            {
                self.out.push(
                    Diagnostic::error(Code::Duplicate, at.span(range), format!("`{name}` is given twice"))
                        .help("set it as a property or as a child, not both"),
                );
            }
        }
        for child in at.node.children() {
            let below = child.children().next().map(|n| &n.name_range);
            if let Some(range) = child.props.first().map(|p| &p.name_range).or(below) {
                self.out.push(
                    Diagnostic::error(Code::UnknownProperty, at.span(range), "an input takes only arguments")
                        .help(format!("write `{} VALUE`", child.name)),
                );
            }
        }
        let mut own = Vars::new();
        for input in &configuration.inputs {
            let name = input.at.name();
            let was = || were.get(&value::template_name(name)).cloned();
            let value = given.remove(name).or_else(was).or_else(|| {
                let mut vars = params.clone();
                vars.extend(own.clone());
                self.default(input, &vars)
            });
            match value {
                Some(value) => {
                    own.insert(value::template_name(name), value);
                }
                None if input.default().is_some() || self.out.len() > before => {}
                None => self.out.push(
                    Diagnostic::error(
                        Code::MissingInput,
                        at.head(),
                        format!("`{}` needs the input `{name}`", configuration.at.name()),
                    )
                    .related(input.at.head(), "declared here, without a default")
                    .help(format!("add `{name}=...`, {}", article(input.ty))),
                ),
            }
        }
        (self.out.len() == before).then_some(own)
    }

    /// Converts arguments to a typed value; reports a mistake.
    fn value(&mut self, args: &[Arg], ty: InputType, place: &ValuePlace, scope: &Scope) -> Option<Value> {
        if ty == InputType::List {
            let mut items = Vec::new();
            let mut open = false;
            for arg in args {
                match &arg.value {
                    Scalar::String(_) => {
                        let rendered = self.render(arg, place.source, scope)?;
                        open |= rendered.open;
                        items.push(rendered.text);
                    }
                    Scalar::Int(n) => items.push(n.to_string()),
                    _ => return self.wrong(ty, arg, place),
                }
            }
            if open {
                return Some(Value::Open(items.join(", ")));
            }
            return Some(Value::List(items));
        }
        let [arg] = args else {
            self.out.push(
                Diagnostic::error(
                    Code::WrongType,
                    place.span,
                    format!("expected one value: {}", article(ty)),
                )
                .help("only the type `list` takes several values"),
            );
            return None;
        };
        match (&arg.value, ty) {
            (Scalar::String(written), _) => {
                let Rendered { text: rendered, open } = self.render(arg, place.source, scope)?;
                if open {
                    return Some(Value::Open(rendered));
                }
                match ty {
                    InputType::String => Some(Value::String(rendered)),
                    InputType::Path => {
                        let span = place.arg(arg);
                        let Some(file) = place.base.join(&rendered) else {
                            self.out.push(load::outside(&rendered, span));
                            return None;
                        };
                        Some(Value::Path(file))
                    }
                    InputType::Int | InputType::Bool if !value::is_template(written) => {
                        self.wrong(ty, arg, place)
                    }
                    _ => match ty.parse(&rendered) {
                        Ok(value) => Some(value),
                        Err(help) => {
                            self.out.push(
                                Diagnostic::error(
                                    Code::InvalidValue,
                                    place.arg(arg),
                                    format!("invalid value `{rendered}`: expected {}", article(ty)),
                                )
                                .help(help),
                            );
                            None
                        }
                    },
                }
            }
            (Scalar::Int(n), InputType::Int) => {
                i64::try_from(*n).ok().map(Value::Int).or_else(|| self.wrong(ty, arg, place))
            }
            (Scalar::Int(n), InputType::Size) => {
                u64::try_from(*n).ok().map(Value::Size).or_else(|| self.wrong(ty, arg, place))
            }
            (Scalar::Bool(b), InputType::Bool) => Some(Value::Bool(*b)),
            _ => self.wrong(ty, arg, place),
        }
    }

    fn wrong<T>(&mut self, ty: InputType, arg: &Arg, place: &ValuePlace) -> Option<T> {
        let what = if matches!(arg.value, Scalar::Int(_)) && matches!(ty, InputType::Int | InputType::Size) {
            "a number out of range"
        } else {
            arg.value.type_name()
        };
        self.out.push(
            Diagnostic::error(
                Code::WrongType,
                place.arg(arg),
                format!("expected {}, not {what}", article(ty)),
            )
            .help(corrected(ty, &arg.value)),
        );
        None
    }
}

/// The place of a value, and the file that its paths are relative to.
struct ValuePlace<'a> {
    source: SourceId,
    base: &'a FileRef,
    span: Span,
}

impl ValuePlace<'_> {
    fn arg(&self, arg: &Arg) -> Span {
        Span { source: self.source, start: arg.range.start, end: arg.range.end }
    }
}

/// Says how to write a value of a type: the given one in another spelling, if that
/// is possible, or else an example.
fn corrected(ty: InputType, given: &Scalar) -> String {
    let spelled = match (ty, given) {
        (InputType::Int, Scalar::String(text)) => text.trim().parse::<i64>().ok().map(|n| n.to_string()),
        (InputType::Bool, given) => value::boolean(&given.shown()).map(|is_true| format!("#{is_true}")),
        (InputType::String | InputType::Path, Scalar::Int(_) | Scalar::Float(_) | Scalar::Bool(_)) => {
            Some(format!("\"{}\"", given.shown()))
        }
        _ => None,
    };
    let example = match ty {
        InputType::String | InputType::Path => "\"...\"",
        InputType::Int => "80",
        InputType::Bool => "#true",
        InputType::Size => "\"512MiB\"",
        InputType::Duration => "\"90s\"",
        InputType::List => "\"a\" \"b\"",
    };
    match spelled {
        Some(spelled) => format!("write `{spelled}`"),
        None => format!("the type is `{}`: write a value such as `{example}`", ty.name()),
    }
}

fn article(ty: InputType) -> &'static str {
    match ty {
        InputType::String => "a string",
        InputType::Int => "an integer",
        InputType::Bool => "`#true` or `#false`",
        InputType::Size => "a size such as \"512MiB\"",
        InputType::Duration => "a duration such as \"90s\"",
        InputType::Path => "a path in the project",
        InputType::List => "a list of strings",
    }
}
